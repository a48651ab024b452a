"""Ratios in turn, and that the speed page has those of the committed file."""

import json

import pytest

from experiments.speed import forms, turns


def test_a_ratio_is_of_medians_and_its_range_of_rounds():
    found = turns.ratio([2.0, 6.0, 8.0], [1.0, 2.0, 8.0])
    assert found == {"ratio": 3.0, "low": 1.0, "high": 3.0}
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = turns.in_turn(calls, rounds=2, times=2)
    assert order == ["a", "a", "b", "b"] * 2
    assert {name: len(each) for name, each in times.items()} == {"a": 2, "b": 2}


def test_the_speed_page_has_the_committed_ratios():
    lines = (forms.PATH.parents[1] / "README.md").read_text("utf-8").splitlines()
    rows = json.loads(forms.PATH.read_text("utf-8"))["rows"]
    assert len(rows) == 2 * len(forms.SEQUENCES) + 2
    for start, what in (
        ("| a decoded token, 64 tiles, two bits", "a token, two bits a weight"),
        ("| the same, a byte a weight", "a token, a byte a weight"),
    ):
        (line,) = (line for line in lines if line.startswith(start))
        (row,) = (row for row in rows if row["what"] == what)
        assert f"**{row['ratio']:.1f}**" in line
        assert f"| {row['low']:.1f} to {row['high']:.1f} |" in line
    for batch, length in forms.SEQUENCES:
        (line,) = (x for x in lines if f" {batch} x {length:,}" in x and x[0] == "|")
        piece, dot = (row for row in rows if row.get("length") == length)
        assert f"| {dot['ratio']:.1f}; {piece['ratio']:.1f} |" in line
        ranges = (f"{row['low']:.1f} to {row['high']:.1f}" for row in (dot, piece))
        assert f"| {'; '.join(ranges)} |" in line


@pytest.mark.slow
def test_both_are_timed():
    rows = forms.attention(2, 128, 1) + forms.token(1, d_model=128, tiles=4)
    assert len(rows) == 4
    assert all(0 < row["low"] <= row["ratio"] <= row["high"] for row in rows)
