"""Shapeland: what a scene says of itself is what is drawn, and captions never say who the subject is."""

import numpy as np
import pytest

from dynaip_jax.shapeland import world as synthetic
from dynaip_jax.shapeland.dataset import sample_mixed
from train.shapeland.configs import TOKENS


def scene(seed=0, count=1, split="test", **options):
    return synthetic.sample_scene(synthetic.generator(seed, split, 0), count, **options)


def plain(**changes):
    """A white circle in the middle of grass at noon, without pattern, outline or emblem."""
    white = (1.0, 1.0, 1.0)
    identity = synthetic.Identity(white, white, "stripes", 1.5, 0.0, 0.0, 1.0, "none", 1.0)
    placed = synthetic.Placed("circle", identity, "middle", 32.0, 32.0, 15.0, 0.0)
    return synthetic.Scene("grass", "noon", (placed._replace(**changes),), 0)


def test_the_same_seed_draws_the_same_picture_and_another_seed_another_one():
    one, again, other = (synthetic.render(scene(seed)).image for seed in (3, 3, 4))
    assert (one == again).all() and (one != other).any()


def test_no_identity_is_in_two_splits():
    identities = [scene(0, split=split).subjects[0].identity for split in synthetic.SPLITS]
    assert len(set(identities)) == len(identities)


@pytest.mark.parametrize("kind", synthetic.CLASSES)
def test_masks_cover_what_is_drawn(kind):
    drawn = synthetic.render(plain(kind=kind))
    mask = drawn.masks[0]
    assert (drawn.image[mask == 1] == 255).all()
    empty = synthetic.render(plain()._replace(subjects=())).image
    assert (drawn.image[mask == 0] == empty[mask == 0]).all()
    edge = (mask > 0) & (mask < 1)
    assert 10 < edge.sum() < (mask == 1).sum()  # anti-aliased, and only at the edge


def test_the_area_of_a_circle_is_right():
    area = synthetic.render(plain(radius=15.0)).masks[0].sum()
    assert area == pytest.approx(np.pi * (0.92 * 15) ** 2, rel=0.01)


def test_a_later_subject_hides_an_earlier_one():
    one = plain().subjects[0]
    both = synthetic.Scene("sand", "noon", (one, one._replace(kind="square")), 0)
    first, second = synthetic.render(both).masks
    assert (first + second <= 1 + 1e-6).all() and first.sum() < 0.2 * second.sum()


def test_light_is_a_factor_of_each_channel():
    noon, dusk = (synthetic.render(plain()._replace(light=light)).image / 255 for light in ("noon", "dusk"))
    np.testing.assert_allclose(dusk, noon * synthetic.LIGHTS["dusk"], atol=1 / 255)


def test_captions_name_class_and_scene_and_never_the_identity():
    look = {*synthetic.COLOURS, *synthetic.PATTERNS, *synthetic.EMBLEMS, "dark", "black", "white"}
    for n in range(200):
        s = sample_mixed(synthetic.generator(0, "test", n))
        words = synthetic.caption(s).split()
        assert not look & set(words)
        assert {s.background, s.light, *(x.kind for x in s.subjects)} <= set(words)
        assert {*words, *synthetic.description(s).split()} <= set(synthetic.vocabulary())
    assert synthetic.caption(plain()) == "a circle in the middle on grass at noon"
    assert synthetic.caption(plain(radius=22.0)) == "a large circle on grass at noon"


def test_captions_leave_open_what_they_are_not_asked_to_say():
    said = {(): "a circle", ("light",): "a circle at noon", ("column", "background"): "a circle in the middle on grass"}
    for parts, text in said.items():
        assert synthetic.caption(plain(), parts) == text
    assert synthetic.description(plain(), ()) == "a red circle with red stripes"  # white has no hue
    assert synthetic.caption(scene(3, 2), ()).count(" and ") == 1


def test_descriptions_of_several_subjects_tell_a_colour_each_and_none_is_cut_off():
    (circle,) = plain().subjects
    two = plain()._replace(subjects=(circle, circle._replace(kind="star")))
    assert synthetic.description(two, ()) == "a red circle and a red star"
    longest = max(len(synthetic.description(scene(n, count)).split()) for count in (1, 2, 3) for n in range(400))
    assert 18 < longest < TOKENS["t5_length"]  # one is for the end


@pytest.mark.parametrize("count", (1, 2, 3))
def test_subjects_are_of_different_classes_in_different_columns_and_whole(count):
    for seed in range(50):
        subjects = scene(seed, count).subjects
        assert len({s.kind for s in subjects}) == len({s.position for s in subjects}) == count
        for s in subjects:
            assert abs(s.x - synthetic.POSITIONS[s.position]) < 9 and s.radius <= s.x <= synthetic.SIZE - s.radius


def test_a_pair_shows_one_identity_twice():
    rng = synthetic.generator(0, "test", 5)
    subject = synthetic.sample_scene(rng, 1).subjects[0]
    close = synthetic.close_view(rng, subject).subjects[0]
    assert (close.kind, close.identity) == (subject.kind, subject.identity) and synthetic.is_large(close)


def test_an_unknown_class_is_an_error():
    with pytest.raises(ValueError, match="class 'cat': expected one of"):
        synthetic.render(plain(kind="cat"))
