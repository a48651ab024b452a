"""Reports of runs and of the demo, from synthetic run directories."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import yaml

from trix_jax.cli.report import run_report
from trix_jax.lm.config import RunConfig, from_tree, to_tree
from trix_jax.lm.demo import PRESET
from trix_jax.lm.ngram import floors
from trix_jax.lm.report import demo, run
from trix_jax.lm.report.plots import spread
from trix_jax.lm.report.record import read_run
from trix_jax.lm.serve.load import open_run_data

LAYERS, TILES, STEP_TOKENS = 2, 8, 768
FLOORS = {"1": 3.3, "2": 2.48, "3": 2.1, "4": 2.0, "5": 1.99}


def write_run(
    directory: Path, final: float, dense: bool = False, evals: int = 3, steps: int = 60
) -> Path:
    """A run directory as `train` leaves it, ending at validation loss `final`."""
    random = np.random.default_rng(0)
    layers = 0 if dense else LAYERS
    usage = random.dirichlet(np.full(TILES, 50.0), layers).tolist()
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = final + 2 * math.exp(-4 * step / steps)
        lines.append(
            {
                "event": "step",
                "step": step,
                "tokens": step * STEP_TOKENS,
                "loss": loss + 0.05 * random.standard_normal(),
                "lr": 1e-3,
                "grad_norm": 1.0,
                "tokens_per_second": 2e4 + 1e3 * random.standard_normal(),
                "memory_bytes": 600 * 2**20,
                "routing_entropy": [math.log(TILES) * 0.9] * layers,
                "aux_balance": 0.1,
                "aux_diversity": 0.01 * step,
            }
        )
        if step % (steps // evals) == 0:
            is_first = step == steps // evals
            lines.append(
                {
                    "event": "eval",
                    "step": step,
                    "tokens": step * STEP_TOKENS,
                    "val_loss": final if step == steps else loss,
                    "val_ppl": math.exp(loss),
                    "val_bits_per_byte": loss / math.log(2),
                    "tile_usage": usage,
                    "routing_stability": [] if is_first else [0.6] * layers,
                    "dead_tiles": [0] * layers,
                }
            )
    routing = [{"entropy": 1.9, "max_load": 1.4, "dead_tiles": 0}] * layers
    summary = {
        "best_val_loss": final,
        "final_val_loss": final,
        "final_val_ppl": math.exp(final),
        "final_val_bits_per_byte": final / math.log(2),
        "seconds": 12.5,
        "tokens": steps * STEP_TOKENS,
        "params": {"total": 900, "ffn": 600, "ffn_active": 100, "ffn_bits": 2000},
        "routing": routing,
    }
    env = {
        "python": "3.13.0",
        "system": "Linux x86_64",
        "cpu_count": 2,
        "devices": ["cpu"],
        "packages": {"jax": "0.12.0", "flax": "0.12.12"},
        "git_commit": None,
    }
    config = to_tree(RunConfig(arm="dense" if dense else "hierarchical"))
    config["model"]["ffn"] = "dense" if dense else "hierarchical"
    config["data"]["path"] = str(directory / "data")
    directory.mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text, encoding="utf-8")
    (directory / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (directory / "env.json").write_text(json.dumps(env), encoding="utf-8")
    (directory / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return directory


def write_demo(
    workdir: Path, trix: float, dense: float, evals: int = 3
) -> dict[str, Any]:
    """The runs of a demo; returns its result."""
    write_run(workdir / "trix", trix, evals=evals)
    for arm in ("dense", "dense_w"):
        write_run(workdir / arm, dense, dense=True, evals=evals)
    arms = {
        arm: {
            "val_loss": loss,
            "val_ppl": math.exp(loss),
            "val_bits_per_byte": loss / math.log(2),
            "params_total": 900,
            "ffn_active": active,
        }
        for arm, loss, active in (
            ("trix", trix, 40_000),
            ("dense", dense, 130_000),
            ("dense_w", dense, 41_000),
        )
    }
    layer = {"entropy": 1.9, "max_load": 1.4, "dead_tiles": 0}
    return {
        "workdir": str(workdir),
        "seconds": 200.0,
        "arms": arms,
        "ngram": FLOORS,
        "routing": [layer] * LAYERS,
        "bytes": {"ffn_float32": 2_097_152, "ffn_packed": 135_000},
        "packed": {"val_loss": trix},
        "prompt": "def ",
        "sample": 'def f():\n    """Like ```sh``` or ````x````."""\x00\n',
        "config": {
            "steps": 60,
            "tokens": 46_080,
            "d_model": 128,
            "n_layers": LAYERS,
            "num_tiles": TILES,
            "tiles_per_token": 2,
            "context": 64,
            "batch_size": 12,
            "corpus": str(workdir / "input.txt"),
            "val_tokens": 111_540,
        },
    }


def check_page(path: Path, machine: Path) -> str:
    """Links resolve, pictures show something, nothing names the machine."""
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links
    for link in links:
        target = path.parent / link
        assert not Path(link).is_absolute()
        assert target.is_file()
        if target.suffix == ".png":
            assert target.stat().st_size > 4000
            assert matplotlib.image.imread(target)[..., :3].std() > 0.01
    assert str(machine) not in text
    assert "nan" not in text.split("```")[0].lower().split()
    return text


@pytest.mark.parametrize(
    ("trix", "dense", "packed", "sentences"),
    [
        (
            1.7,
            1.8,
            1.7,
            [
                "**TriX wins** by 0.1000 nats",
                "TriX is 0.905 times its twin's",
                "ahead of the dense model of equal cost**: -0.1000",
                "All are below the bigram floor of 2.480",
                "No difference",
            ],
        ),
        pytest.param(
            2.6,
            2.4,
            2.600002,
            [
                "**The dense twin wins** by 0.2000 nats",
                "TriX is 1.221 times its twin's",
                "behind the dense model of equal cost**: +0.2000",
                "floor of 2.480: dense twin, dense of equal cost; **not**: TriX",
                "is rounding.",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2.476,
            2.482,
            2.476,
            [
                "**TriX wins** by 0.0060 nats",
                "TriX is 0.994 times its twin's",
                "floor of 2.480: TriX; **not**: dense twin, dense of equal cost",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            2.603,
            2.6,
            2.613,
            [
                "**A tie.**",
                "0.0030 nats per token apart (a perplexity ratio of 1.003)",
                "**level with the dense model of equal cost**: +0.0030",
                "**None is below the bigram floor** of 2.480",
                "is more than rounding.**",
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_demo_report_says_what_the_numbers_say(
    tmp_path, trix, dense, packed, sentences
):
    result = write_demo(tmp_path, trix, dense) | {"packed": {"val_loss": packed}}
    text = check_page(demo.write_demo_report(tmp_path, result), tmp_path)
    for sentence in sentences:
        assert sentence in text
    assert text.count(" wins** ") == ("**A tie.**" not in text)
    assert "demonstration, not evidence" in text
    assert "**3.2 times fewer**" in text  # 130,000 / 40,000 multiply-accumulates
    assert "**15.5 times fewer**" in text  # 2,097,152 / 135,000 bytes
    assert "**Alive**: 0 of 16 tiles dead" in text
    assert "After the prompt `def `:" in text


@pytest.mark.slow
def test_demo_report_says_what_rates_were_tuned_for(tmp_path, monkeypatch):
    assert (PRESET.train.steps, PRESET.seed) == demo.SWEPT
    result = write_demo(tmp_path, 1.7, 1.8)
    own = demo._own(read_run(tmp_path / "trix").config)
    best = "each better than its half and double"
    for swept, found in ((own, best), ((9, 9), "not of these")):
        monkeypatch.setattr(demo, "SWEPT", swept)
        text = demo.write_demo_report(tmp_path, result).read_text("utf-8")
        assert f"swept for {swept[0]} steps of seed {swept[1]}, {found}:" in text
        assert "(TriX " in text


@pytest.mark.slow
def test_demo_report_of_one_evaluation_and_a_collapse(tmp_path):
    result = write_demo(tmp_path, 1.7, 1.8, evals=1)
    result["ngram"] = {int(order): loss for order, loss in FLOORS.items()}
    result["routing"][0] = {"entropy": 0.5, "max_load": 6.0, "dead_tiles": 3}
    for arm in demo.ARMS:
        (tmp_path / arm / "REPORT.md").touch()
    text = check_page(demo.write_demo_report(tmp_path, result), tmp_path)
    assert "(trix/REPORT.md)" in text
    assert "**Not healthy**: 3 of 16 tiles dead" in text
    fence = "`" * 5  # one more than the sample has
    inside = text.split(f"\n{fence}text\n")[1].split(f"\n{fence}\n")[0]
    assert inside == result["sample"].replace("\x00", "\ufffd").rstrip()


def test_demo_report_refuses_a_result_without_bigram(tmp_path):
    result = write_demo(tmp_path, 1.7, 1.8) | {"ngram": {"1": 3.3}}
    with pytest.raises(ValueError, match="order 2"):
        demo.write_demo_report(tmp_path, result)


@pytest.mark.parametrize(("section", "key"), [("bytes", "ffn_packed"), ("", "sample")])
def test_demo_report_names_the_key_that_a_result_lacks(tmp_path, section, key):
    result = write_demo(tmp_path, 1.7, 1.8)
    del (result[section] if section else result)[key]
    with pytest.raises(ValueError, match=f"Got no {key}"):
        demo.write_demo_report(tmp_path, result)


@pytest.mark.parametrize(
    ("evals", "steps"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 60)]
)
def test_report_of_a_routed_run_has_all_figures(tmp_path, evals, steps):
    directory = write_run(tmp_path / "run", 1.75, evals=evals, steps=steps)
    text = check_page(run.write_run_report(directory), tmp_path)
    for name in ("loss", "tile_usage", "routing", "resources"):
        assert f"(plots/{name}.png)" in text
    assert "1.7500" in text


@pytest.mark.slow
def test_a_run_stands_beside_counting_and_its_twin(tmp_path):
    directory = write_run(tmp_path / "run", 1.75, evals=3, steps=60)
    twin = write_run(tmp_path / "dense", 1.5, dense=True, evals=3, steps=60)
    floors = run.Floors({2: 1.7, 3: 2.0}, 5000)
    text = check_page(run.write_run_report(directory, floors, twin), tmp_path)
    rows = [line for line in text.splitlines() if "counting" in line]
    assert rows == [
        "| bigram, counting 5,000 tokens | 1.7000 | +0.0500 |",
        "| trigram, counting 5,000 tokens | 2.0000 | -0.2500 |",
    ]
    assert re.search(
        r"beside it: dense FFNs of width \d+, [\d,]+ tokens \| 1.5000 \| \+0.2500", text
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [(0.1, "rate decays")]),
        ({"train": {"schedule": "constant"}}, []),
        ({"train": {"schedule": "wsd"}}, [(0.8, "rate decays")]),
        (
            {"model": {"ternary": {"full_precision_fraction": 0.25}}},
            [(0.1, "rate decays"), (0.25, "weights become ternary")],
        ),
        (
            {"model": {"routing": {"hold_after": 0.5}, "ternary": {"mode": "none"}}},
            [(0.1, "rate decays"), (0.5, "addresses are held")],
        ),
    ],
)
def test_moments_are_in_tokens(tmp_path, changes, expected):
    record = read_run(write_run(tmp_path / "run", 1.75, evals=1, steps=60))
    train, model = {"steps": 60, "warmup_steps": 6}, {"ffn": "sparse"}
    tree = {
        "train": train | changes.get("train", {}),
        "model": model | changes.get("model", {}),
    }
    each = record.steps[-1]["tokens"] / record.steps[-1]["step"]
    found = run.moments(record._replace(config=from_tree(tree)))
    assert [
        (round(tokens / each / 60, 6), words) for tokens, words in found
    ] == expected


@pytest.mark.slow
def test_report_of_a_dense_run_has_no_routing_and_is_the_same_again(tmp_path):
    directory = write_run(tmp_path / "run", 1.75, dense=True, evals=1)
    path = run.write_run_report(directory)
    assert "Routing" not in check_page(path, tmp_path)
    before = {p: p.read_bytes() for p in [path, *(directory / "plots").iterdir()]}
    assert {p.name for p in before} == {"REPORT.md", "loss.png", "resources.png"}
    run.write_run_report(directory)
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize(
    "name", ["summary.json", "env.json", "config.yaml", "metrics.jsonl"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_report_names_the_file_that_is_damaged(tmp_path, name, damage):
    path = write_run(tmp_path / "run", 1.75) / name
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:40])
    elif damage == "empty":
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(name)):
        run.write_run_report(tmp_path / "run")


def test_report_names_the_line_of_metrics_that_lacks_a_value(tmp_path):
    path = write_run(tmp_path / "run", 1.75) / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[4] = lines[4].replace('"loss"', '"lost"')
    path.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 5 .*Got no loss"):
        run.write_run_report(tmp_path / "run")


def test_spread_keeps_labels_apart_in_order_and_close():
    wanted = np.array([0.5, 0.1, 0.52, 0.51])
    placed = spread(wanted, 0.1)
    np.testing.assert_allclose(placed, [0.41, 0.1, 0.61, 0.51])


@pytest.mark.slow
def test_a_run_is_reported_beside_its_own_data(run_dir, tmp_path):
    here = tmp_path / "run"
    shutil.copytree(run_dir, here)
    text = run_report(here, pytest.fail).read_text()
    store = open_run_data(here)
    assert (
        f"bigram, counting {len(store.train):,} tokens | {floors(store)[2]:.4f}" in text
    )
    (store.directory / "manifest.json").unlink()
    said = []
    assert "counting" not in run_report(here, said.append).read_text()
    assert len(said) == 1
    assert said[0].startswith("no n-gram floor: ")


@pytest.mark.slow
def test_a_twin_on_other_data_is_refused(run_dir, tmp_path):
    here, other = (shutil.copytree(run_dir, tmp_path / n) for n in ("run", "other"))
    assert "beside it: sparse FFNs" in run_report(here, pytest.fail, other).read_text()
    (path,) = (other / "checkpoints").glob("*10/meta.json")
    meta = json.loads(path.read_text()) | {"data_fingerprint": "0123456789abcdef"}
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"Got .*other, trained on 0123456789ab\."):
        run_report(here, pytest.fail, other)
    shutil.rmtree(other / "checkpoints")
    with pytest.raises(ValueError, match="other has none"):
        run_report(here, pytest.fail, other)
