"""CP and PF: what they mean, that they are what the verdict says, and that a judge that cannot see is doubted."""

import jax
import numpy as np
import pytest

from dynaip_jax.shapeland import default, scoring, world
from dynaip_jax.shapeland.cases import make_cases, truth
from dynaip_jax.shapeland.judge import Verdict, init_judge
from dynaip_jax.shapeland.scoring import Calibration, calibrate, doubts, scores
from dynaip_jax.shapeland.world import BACKGROUNDS, CLASSES, LIGHTS
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
    true = scores(judge, cases.renders, cases, calibration)
    assert true.cp.mean() == pytest.approx(1, abs=0.1) and true.pf.mean() > 0.98
    others = []
    for n, scene in enumerate(cases.scenes):
        rng = world.generator(6, "test", n)
        placed = scene.subjects[0]._replace(identity=world.sample_identity(rng))
        others.append(world.render(scene._replace(subjects=(placed,))).image)
    other = scores(judge, np.stack(others), cases, calibration)
    assert abs(other.cp.mean()) < 0.15 and other.pf.mean() > 0.98
    for part in scoring.IDENTITY_PARTS:
        assert true.parts[f"CP {part}"].mean() == pytest.approx(1, abs=0.3)
        assert other.parts[f"CP {part}"].mean() == pytest.approx(0, abs=0.3)


def test_parts_are_read_off_true_renders(calibration):
    """Better than by chance, which has a quarter of the patterns and emblems right."""
    for part in scoring.IDENTITY_PARTS:
        same, other = calibration.parts[part]
        assert same > 0.6 and same > other + 0.1, part


def test_references_that_are_pasted_leak(judge, calibration):
    cases = make_cases(1, seed=5, num=96)
    pasted = scores(judge, cases.references[:, 0], cases, calibration)
    drawn = scores(judge, cases.renders, cases, calibration)
    for part in ("background", "light"):
        leak = pasted.parts[f"leak {part}"]
        asked_otherwise = [
            getattr(a, part) != getattr(b[0], part) for a, b in zip(cases.scenes, cases.shown, strict=True)
        ]
        assert (np.isnan(leak) != asked_otherwise).all()
        assert np.nanmean(leak) > 0.95 and np.nanmean(drawn.parts[f"leak {part}"]) < 0.05


@pytest.mark.parametrize("subjects", (1, 3))
def test_an_untrained_judge_is_doubted(subjects):
    untrained = init_judge(jax.random.key(0))
    calibration = calibrate(untrained, subjects)
    cases = make_cases(subjects, seed=5, num=24)
    cp, pf, _ = scores(untrained, cases.renders, cases, calibration)
    assert cp.shape == pf.shape == (24,) and np.isfinite(cp).all() and ((pf >= 0) & (pf <= 1)).all()
    assert doubts({subjects: calibration})  # it cannot tell classes, and says so


def test_scores_are_what_the_verdict_says(monkeypatch):
    """A verdict made by hand: of two subjects one is found, but in the wrong column, with its own colours, the other's pattern and none of the
    emblems; the background is right, light and number are the references' and wrong."""
    cases = make_cases(2, seed=5, num=1)
    elsewhere = (cases.scenes[0].light == "noon" and "night") or "noon"
    cases = cases._replace(shown=[tuple(view._replace(light=elsewhere, background="sand") for view in cases.shown[0])])
    asked = truth([cases.scenes[0]._replace(background="sand")])
    cases = cases._replace(scenes=[cases.scenes[0]._replace(background="sand")])
    first, second = np.flatnonzero(asked.position[0] >= 0)
    present = np.full((1, len(CLASSES)), -1.0)
    present[0, first] = 1
    position = np.zeros((1, len(CLASSES), 3))
    position[0, first, (asked.position[0, first] + 1) % 3] = 1
    identity = np.zeros((1, len(CLASSES), 2))
    identity[0, first], identity[0, second] = (1, 0), (0, 1)
    colours = asked.colours[:, :, ::-1].copy()  # in the other order
    colours[0, second] += 0.5
    seen = Verdict(
        present=present,
        position=position,
        background=np.eye(len(BACKGROUNDS))[asked.background],
        light=np.eye(len(LIGHTS))[[list(LIGHTS).index(elsewhere)]],
        number=np.eye(4)[[3]],
        identity=identity,
        colours=colours,
        pattern=np.eye(4)[np.maximum(asked.pattern, 0)],
        emblem=np.eye(4)[(asked.emblem + 1) % 4],
        look=np.zeros((1, 1, len(CLASSES))),
    )
    target = seen._replace(identity=np.broadcast_to([1.0, 0.0], identity.shape))
    verdicts = iter([seen, target])
    monkeypatch.setattr(scoring, "read", lambda *_: next(verdicts))
    calibration = Calibration(0.9, 0.1, dict(colours=(1.0, 0.5), pattern=(1.0, 0.25), emblem=(0.75, 0.25)), accuracy={})
    cp, pf, parts = scores(None, cases.renders, cases, calibration)
    assert pf[0] == pytest.approx(2 / 7)  # a class and the background
    assert cp[0] == pytest.approx((0.5 - 0.1) / 0.8)
    found = {name: float(value[0]) for name, value in parts.items()}
    expected = {
        "CP colours": (0.75 - 0.5) / 0.5, "CP pattern": 1, "CP emblem": -0.25 / 0.5,
        "PF classes": 0.5, "PF column": 0, "PF background": 1, "PF light": 0, "PF number": 0,
        "leak light": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert np.isnan(found["leak background"])  # the references' is the prompt's
