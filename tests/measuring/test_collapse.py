"""Collapsed subjects: seen where a mean over the picture sees nothing."""

import numpy as np

from dynaip_jax.measuring.collapse import clusters, collapsed, cut_out, found_regions

A, B, C = np.eye(4, dtype=np.float32)[:3]
REFERENCES = np.stack([A, B])


def near(x, other, share=0.9):
    y = share * x + (1 - share) * other
    return y / np.linalg.norm(y)


def test_both_there_one_lost_and_clones():
    for regions, given, lost in (
        ([near(A, C), near(B, C)], True, [False, False]),
        ([near(B, C), near(A, C)], True, [True, True]),  # swapped
        ([near(B, C), near(A, C)], False, [False, False]),  # wherever they are
        ([near(A, C), near(A, B)], True, [False, True]),  # clones of one
        ([near(A, C), near(A, B)], False, [False, True]),
        ([near(A, B, 0.5), C], True, [True, True]),  # a mixture of both, and neither
        ([near(A, C)], False, [False, True]),  # one region alone
        (np.zeros((0, 4)), False, [True, True]),
    ):
        np.testing.assert_array_equal(collapsed(np.asarray(regions), REFERENCES, given), lost)
    alike = np.stack(
        [A, near(A, B)]
    )  # subjects that are nearly one: a region has to be nearer to its own than they are
    np.testing.assert_array_equal(collapsed(np.stack([A, near(A, B)]), alike, True), [False, False])
    np.testing.assert_array_equal(collapsed(np.stack([near(A, C, 0.7), near(A, B)]), alike, True), [True, False])


def test_clip_i_does_not_see_it_and_this_does():
    """The mean cosine to all references is the same for a faithful picture and one of two clones."""
    faithful, clones = np.stack([A, B]), np.stack([A, A])
    mean = [np.mean(REFERENCES @ picture.mean(axis=0)) for picture in (faithful, clones)]
    assert mean[0] == mean[1]
    assert [collapsed(picture, REFERENCES, True).mean() for picture in (faithful, clones)] == [0, 0.5]


def test_regions_are_found_without_the_background():
    rng = np.random.default_rng(0)
    patches = np.tile(C, (14, 14, 1)) + rng.normal(0, 0.02, (14, 14, 4))
    patches[2:6, 1:5], patches[8:12, 8:13] = A, B
    patches[8:10, 2:4] = A  # a smaller clone that does not touch
    patches[0, 9] = A  # a speck
    found = found_regions(patches.astype(np.float32), 2)
    assert [region.sum() for region in found] == [20, 16, 4]
    assert found[0][8:12, 8:13].all() and found[1][2:6, 1:5].all() and found[2][8:10, 2:4].all()
    assert found_regions(np.tile(C, (4, 4, 1)), 2) == []
    np.testing.assert_array_equal(clusters(np.stack([A, B, A, B]), 2), clusters(np.stack([A, B, A, B]), 2))


def test_cut_outs_show_a_region_alone():
    picture = np.zeros((60, 120, 3), np.uint8)
    picture[:, :60] = (200, 0, 0)
    region = np.zeros((2, 4), bool)
    region[0, 0] = True  # 30 x 30 pixels, upper left
    left, none = cut_out(picture, [region, np.zeros((2, 4), bool)])
    assert left.shape == (35, 35, 3) and (left[2:32, 2:32] == (200, 0, 0)).all() and (left[0] == (123, 117, 104)).all()
    assert none.shape == (16, 16, 3)
    region[1, 3] = True  # the box holds both corners, the other corners are grey
    (both,) = cut_out(picture, [region])
    assert (both[-1] == (123, 117, 104)).all() and (both == 0).any()
