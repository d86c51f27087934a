"""Maps as numbers: thresholds, overlaps, places of tokens; and what the figures show."""

import numpy as np
import pytest

from dynaip_jax.eval import maps
from dynaip_jax.eval.figures import Cell, coloured, shares, table


def test_an_overlap_is_intersection_over_union():
    heat = np.zeros((8, 8))
    heat[2:6, 2:6] = 1
    mask = np.zeros((8, 8))
    mask[2:6, 4:8] = 1
    assert maps.overlap(heat, heat) == 1.0
    assert maps.overlap(heat, mask) == pytest.approx(8 / 24)
    assert maps.overlap(heat, 1 - heat) == 0.0
    rng = np.random.default_rng(0)
    noisy = heat * 3 + rng.normal(scale=0.3, size=heat.shape)
    assert maps.overlap(7 * noisy - 2, heat) == maps.overlap(noisy, heat) == 1.0


def test_tokens_have_a_place_where_they_are_patches():
    assert maps.on_grid(np.arange(16)).shape == (4, 4)
    np.testing.assert_array_equal(maps.on_grid(np.arange(17)), np.arange(1, 17).reshape(4, 4))
    assert maps.on_grid(np.arange(6)).shape == (1, 6) and maps.on_grid(np.arange(1)).shape == (1, 1)


def test_blocks_to_show_are_few_and_hold_both_ends():
    assert maps.chosen(6) == [0, 1, 2, 3, 4, 5]
    assert maps.chosen(57) == [0, 8, 16, 24, 32, 40, 48, 56]


def view(label="DDS on", gain=0.0):
    places = np.arange(2 * 2 * 4, dtype=float).reshape(2, 2, 2, 2)
    return maps.View(label, np.full((32, 32, 3), 128, np.uint8), places, np.ones((2, 2, 2, 5)) / 5, [gain, gain])


def test_a_figure_has_a_row_for_each_branch_of_each_subject(monkeypatch):
    seen = []
    monkeypatch.setattr(maps, "table", lambda *a: seen.append(a))
    references = [np.zeros((16, 16, 3), np.uint8)] * 2
    maps.figure([view(), view("DDS off", 1.0)], references, ["double 0", "double 1"], "a cup", [1])
    cells, columns, rows, title = seen[0]
    assert (columns, title) == (["", "mean of blocks", "double 1"], "a cup")
    assert [" ".join(row.split()) for row in rows[:3]] == [
        "DDS on image branch, subject 1", "read by image rows", "read by text rows (gain 0)"
    ]  # fmt: skip
    assert len(rows) == len(cells) == 12 and rows[-1].endswith("text rows (gain 1)")
    np.testing.assert_array_equal(cells[0][1].heat, view().places[:, 0].mean(axis=0))
    np.testing.assert_array_equal(cells[0][2].heat, view().places[1, 0])


def test_figures_are_pictures_of_their_cells():
    picture = np.full((40, 40, 3), (10, 200, 30), np.uint8)
    drawn = np.asarray(
        table([[Cell(picture), None], [Cell(picture), Cell(picture, np.eye(4), "x")]], ["a", "b"], ["c", "d"])
    )
    assert (drawn == (10, 200, 30)).all(axis=-1).mean() > 0.2
    assert coloured(np.eye(4), (40, 40))[..., 3].max() == pytest.approx(0.8)
    assert shares(np.full((3, 3), 1 / 3), list("xyz"), ("low", "mid", "high")).size[0] == 768


def test_values_are_plain_numbers_by_name():
    values = maps.as_values([view()], ["double 0", "double 1"])
    assert values["blocks"] == ["double 0", "double 1"] and values["views"][0]["places"][1][0] == [
        [8.0, 9.0],
        [10.0, 11.0],
    ]
    assert np.shape(values["views"][0]["read_by_text"]) == (2, 2, 5)
