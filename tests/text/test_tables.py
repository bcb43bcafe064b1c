"""Plain-text tables."""

from pst_dist.text.tables import aligned


def test_the_first_column_is_aligned_to_the_left_and_the_others_to_the_right():
    rows = [["arm", "accuracy %", "ms"], ["pst", "61.50", "8.0"], ["answer_only", "7.25", ""]]
    assert aligned(rows) == [
        "arm          accuracy %   ms",
        "pst               61.50  8.0",
        "answer_only        7.25     ",
    ]
