"""The speed tables, at a size that takes seconds: keys, units and what is counted,
never a time.
"""

import json
from importlib import util

import pytest

from trix_jax.cli import main
from trix_jax.lm import bench

RATIOS = (
    "forward_vs_dense",
    "forward_vs_one_tile",
    "train_vs_dense",
    "decode_vs_dense",
    "packed_vs_unpacked",
)


@pytest.mark.slow
def test_bench_reports_every_ratio_and_its_table(monkeypatch, capsys):
    for name, value in {"T": 64, "D": 128, "N": 4, "F": 128}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "SHAPES", ((32, 8),))
    assert main(["bench", "--rounds", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(result[key] > 0 for key in RATIOS)
    assert [row["dtype"] for row in result["table"]] == [
        "float32",
        "bfloat16",
        "float32",
    ]
    assert result["table"][-1]["hierarchical_vs_dense"] > 0
    assert result["packed_ratio"] == min(result["packed_ratios"].values())


def test_every_granularity_packs_fifteen_times_smaller():
    ratios = dict(bench.packed_ratios())
    assert ratios.keys() == {"tile", "channel", "group"}
    # A tile's weights take a sixteenth; scales cost two bytes each beside them.
    assert 15.99 < ratios["tile"] < 16
    assert ratios["channel"] == pytest.approx(16 / (1 + 2 * 4 / 512), rel=1e-3)
    assert 14 < ratios["group"] < ratios["channel"]


def test_bench_refuses_too_few_rounds(capsys):
    assert main(["bench", "--rounds", "1"]) == 2
    assert "rounds must be at least 2. Got 1." in capsys.readouterr().err


@pytest.mark.skipif(
    util.find_spec("jax_cuda13_plugin") is not None, reason="the group aot is here"
)
def test_aot_without_its_packages_says_what_is_missing(capsys):
    assert main(["aot", "--target", "h100"]) == 1
    assert "uv sync --group aot" in capsys.readouterr().err
