"""CP and PF: what they mean, that they are what the verdict says, and that a judge that cannot see is doubted."""

import jax
import numpy as np
import pytest

from dynaip_jax.shapeland import default, scoring, world
from dynaip_jax.shapeland.cases import make_cases, truth
from dynaip_jax.shapeland.judge import Verdict, init_judge
from dynaip_jax.shapeland.scoring import Calibration, calibrate, doubts, scores
from dynaip_jax.shapeland.world import BACKGROUNDS, CLASSES
from dynaip_jax.storage.tensors import read_tree


@pytest.fixture(scope="module")
def judge():
    return read_tree(default.JUDGE)


@pytest.fixture(scope="module")
def calibration(judge):
    return calibrate(judge, 1)


def test_the_judge_sees_true_renders(judge, calibration):
    assert doubts({1: calibration}) == []
    assert calibration.same > calibration.other + 0.5


def test_another_identity_has_cp_0_and_a_true_render_1(judge, calibration):
    cases = make_cases(1, seed=5, num=96)
    cp, pf = scores(judge, cases.renders, cases, calibration)
    assert cp.mean() == pytest.approx(1, abs=0.1) and pf.mean() > 0.98
    others = []
    for n, scene in enumerate(cases.scenes):
        rng = world.generator(6, "test", n)
        placed = scene.subjects[0]._replace(identity=world.sample_identity(rng))
        others.append(world.render(scene._replace(subjects=(placed,))).image)
    cp, pf = scores(judge, np.stack(others), cases, calibration)
    assert abs(cp.mean()) < 0.15 and pf.mean() > 0.98


@pytest.mark.parametrize("subjects", (1, 3))
def test_an_untrained_judge_is_doubted(subjects):
    untrained = init_judge(jax.random.key(0))
    calibration = calibrate(untrained, subjects)
    cases = make_cases(subjects, seed=5, num=24)
    cp, pf = scores(untrained, cases.renders, cases, calibration)
    assert cp.shape == pf.shape == (24,) and np.isfinite(cp).all() and ((pf >= 0) & (pf <= 1)).all()
    assert doubts({subjects: calibration})  # it cannot tell classes, and says so


def test_scores_are_what_the_verdict_says(monkeypatch):
    """A verdict made by hand: of two subjects one is found, but in the wrong column, the background is right, the number wrong."""
    cases = make_cases(2, seed=5, num=1)
    asked = truth(cases.scenes)
    first, second = np.flatnonzero(asked.position[0] >= 0)
    present = np.full((1, len(CLASSES)), -1.0)
    present[0, first] = 1
    position = np.zeros((1, len(CLASSES), 3))
    position[0, first, (asked.position[0, first] + 1) % 3] = 1
    background = np.eye(len(BACKGROUNDS))[asked.background]
    identity = np.zeros((1, len(CLASSES), 2))
    identity[0, first], identity[0, second] = (1, 0), (0, 1)
    seen = Verdict(present, position, background, np.eye(4)[[3]], identity)
    target = seen._replace(identity=np.broadcast_to([1.0, 0.0], identity.shape))
    verdicts = iter([seen, target])
    monkeypatch.setattr(scoring, "read", lambda *_: next(verdicts))
    cp, pf = scores(None, cases.renders, cases, Calibration(same=0.9, other=0.1, accuracy={}))
    assert pf[0] == pytest.approx(2 / 6)  # a class and the background
    assert cp[0] == pytest.approx((0.5 - 0.1) / 0.8)
