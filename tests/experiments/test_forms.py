"""Ratios in turn, and that the speed page has those of the committed file."""

import dataclasses
import json

import pytest

from experiments.speed import forms, generation, turns


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


def test_the_speed_page_has_the_committed_tokens_a_second():
    page = (generation.PATH.parents[1] / "README.md").read_text("utf-8")
    rows = json.loads(generation.PATH.read_text("utf-8"))["rows"]
    assert [row["batch"] for row in rows] == [1] * 3 + [8] * 3
    for row in rows:
        cells = (
            f"{row['batch']} | {row['weights']} | {row['tokens_per_second']:,} | "
            f"**{row['ratio']:.1f}** | {row['low']:.1f} to {row['high']:.1f} | "
            f"{row['megabytes']:.0f} |"
        )
        assert cells in page


@pytest.mark.slow
def test_models_generate_in_turn():
    small = {"vocab_size": 32, "d_model": 16, "n_layers": 1, "n_heads": 2}
    config = dataclasses.replace(generation.CONFIG, num_tiles=4, **small)
    rows = generation.measure(config, batch=2, rounds=1)
    assert [row["weights"] for row in rows] == ["two bits", "a byte", generation.DENSE]
    assert rows[-1]["ratio"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows)
    assert rows[0]["megabytes"] <= rows[1]["megabytes"] <= rows[2]["megabytes"]
