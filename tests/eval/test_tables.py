"""Rows of an evaluation, as numbers and as text."""

import numpy as np

from dynaip_jax.eval.tables import aligned, make_row, table


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
