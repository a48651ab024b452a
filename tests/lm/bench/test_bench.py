"""The speed tables, at a size that takes seconds: keys, units and what is counted,
never a time.
"""

import json
from importlib import util

import numpy as np
import pytest

from trix_jax.cli import main
from trix_jax.lm import bench
from trix_jax.lm.bench.growth import AXES, KINDS, exponent

RATIOS = (
    "forward_vs_dense",
    "forward_vs_one_tile",
    "train_vs_dense",
    "decode_vs_dense",
    "packed_vs_unpacked",
)
SMALL = bench.Sizes(
    tokens=64,
    width=128,
    tiles=4,
    tile_width=128,
    small=((32, 8),),
    many=((32, 16),),
    beyond_cache=(16, 4),
    dense_bytes=8 * 128 * 8 * 128,
    grow=((16, 32), (4, 16), (128, 256)),
    grow_from=(16, 4, 128),
    train_tiles=4,
)


@pytest.mark.slow
def test_bench_reports_every_ratio_and_writes_its_files(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "SIZES", SMALL)
    assert main(["bench", "--rounds", "2", "--json", "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert all(result[key] > 0 for key in RATIOS)
    table = result["table"]
    assert [(row["dtype"], row["tiles"]) for row in table] == [
        ("float32", 4),
        ("bfloat16", 4),
        ("float32", 4),
        ("float32", 8),
        ("float32", 16),
    ]
    assert table[-1]["hierarchical_vs_flat"] > 0
    assert "forward_vs_dense" in table[-2]
    assert "forward_vs_dense" not in table[-1]  # its dense twin is above dense_bytes
    assert result["packed_ratio"] == min(result["packed_ratios"].values())
    assert result["around"]["compilations"] == {"train": 1, "eval": 1}
    assert result["around"]["pipeline_vs_training"] > 0
    for axis in AXES:
        row = result["growth"][axis]
        assert all(np.isfinite(row[kind]["bytes_exponent"]) for kind in KINDS[:2])
    assert result["growth"]["tiles"]["training"]["seconds"][1] is None
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"bench.json", "bench.md", "ratios.png"} | {
        f"growth_{axis}.png" for axis in AXES
    }


def test_exponent_of_a_power_is_its_power():
    sizes = (16, 64, 256)
    assert exponent(sizes, [3 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    assert exponent(sizes, [1.0, None, 16.0]) == pytest.approx(1)


def test_every_granularity_packs_fifteen_times_smaller():
    ratios = bench.packed_ratios()
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
