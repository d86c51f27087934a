"""Rows of an evaluation, as numbers and as text."""

import numpy as np

from dynaip_jax.eval.tables import aligned, differences_table, make_row, parts_of, parts_table, table


def test_a_row_multiplies_case_by_case():
    row = make_row("mine", 2, np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert (row["name"], row["subjects"], row["n"]) == ("mine", 2, 2)
    assert (row["cp"], row["pf"], row["cp_pf"]) == (0.5, 0.5, 0.0)
    assert row["cp_ci"] == [0.0, 1.0] and row["cp_pf_ci"] == [0.0, 0.0]


def test_a_row_tells_its_question():
    row = make_row("mine", 1, np.full(3, 0.25), np.ones(3))
    for question, expected in (({"mine": "is it so?"}, "is it so?"), ({}, "trained differently")):
        header, line = table([row], question).splitlines()
        assert header.split() == ["row", "subjects", "cases", "CP", "PF", "CP·PF", "asks"]
        assert line.endswith(f"0.250  [0.250, 0.250]  1.000  [1.000, 1.000]  0.250  [0.250, 0.250]  {expected}")
    assert table([row | dict(asks="stored?")], {}).endswith("stored?")


def test_columns_are_as_wide_as_their_widest_cell():
    assert aligned([("a", "bc", ""), ("def", "g", "h")]) == "a    bc\ndef  g   h"


def test_parts_are_means_of_the_cases_that_ask_for_them():
    parts = parts_of({"leak light": np.array([1.0, np.nan, 0.0, np.nan]), "leak background": np.full(4, np.nan)})
    assert list(parts) == ["leak light"] and parts["leak light"] == [0.5, 0.0, 1.0]
    rows = [
        make_row("a", 1, np.ones(4), np.ones(4), {"PF light": np.ones(4)}),
        make_row("b", 2, np.ones(4), np.ones(4)),
    ]
    assert parts_table(rows).splitlines() == ["row  subjects  PF light", "a    1         1.000", "b    2"]


def test_differences_have_signs_and_their_leaks():
    difference = dict(
        name="on", against="off", subjects=1, n=4, cp=[0.01, -0.02, 0.04], pf=[0.1, 0.05, 0.15], cp_pf=[-0.5, -0.6, -0.4],
        parts={"leak light": [-0.25, -0.5, 0.0], "PF light": [0.1, 0.0, 0.2]},
    )  # fmt: skip
    header, line = differences_table([difference]).splitlines()
    assert header.split() == ["row", "minus", "subjects", "cases", "CP", "PF", "CP·PF", "leak", "light"]
    assert (
        line.split()
        == (
            "on off 1 4 +0.010 [-0.020, +0.040] +0.100 [+0.050, +0.150] -0.500 [-0.600, -0.400] -0.250 [-0.500, +0.000]"
        ).split()
    )
