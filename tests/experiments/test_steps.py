"""The timing of training steps names every FFN of the front page, and runs; pages show what
the committed files hold.
"""

import ast
import json
import re
import sys

import pytest

from experiments import front_page
from experiments.speed import modelled, original, steps
from experiments.speed.gpu.language_model import WAYS

README = (steps.ROOT / "README.md").read_text("utf-8")
SMALL = "--model.d-model 16 --model.n-layers 1 --model.context 8 --train.batch-size 2 --model.num-tiles 4"
ANSWERS = """
import json, sys
print(json.dumps({"arguments": sys.argv[1:]}), flush=True)
for line in sys.stdin:
    assert line == "step\\n"
    print(0.5, flush=True)
"""


def test_measured_steps_are_those_of_the_front_page():
    measured = json.loads(steps.PATH.read_text("utf-8"))["settings"]
    setting = front_page.SETTINGS[front_page.FRONT]
    widths = setting.compute, setting.memory, setting.params
    front = measured["english-256"]["arms"]
    assert set(front) == {front_page.TRIX, *(f"dense-{w}" for w in widths)}
    assert measured.keys() == steps.SETTINGS.keys()
    for name, each in steps.SETTINGS.items():
        arms = measured[name]["arms"]
        assert {arm: row["flags"] for arm, row in arms.items()} == each.arms


def speed_page():
    return (steps.PATH.parents[1] / "README.md").read_text("utf-8").splitlines()


def shown(row):
    return f"**{row['ratio']:.2f}** | {row['low']:.2f} to {row['high']:.2f} |"


def test_the_speed_page_has_the_committed_ratios():
    arms = json.loads(steps.PATH.read_text("utf-8"))["settings"]["shakespeare-128"]
    (line,) = (
        x for x in speed_page() if x.startswith("| a training step of four of sixteen")
    )
    assert shown(arms["arms"]["dense-512"]["first_is"]) in line
    new = json.loads(steps.PATH.read_text("utf-8"))["settings"]["wikipedia-128"]
    for width in ("384", "512", "1,024", "2,048"):
        first_is = new["arms"][f"dense-{width.replace(',', '')}"]["first_is"]
        lines = [x for x in speed_page() if f"with dense FFNs {width} wide" in x]
        assert any(shown(first_is) in line for line in lines)
        if width == "384":
            assert f"{first_is['ratio']:.2f} times as fast as with 384" in README
        elif width != "512":
            said = f"{first_is['ratio']:.1f} times as fast as with"
            assert re.search(f"{said} (dense FFNs of )?{width}", README)
    as_train_sets_it, huge = json.loads(original.PATH.read_text("utf-8"))
    details = (steps.PATH.parents[1] / "DETAILS.md").read_text("utf-8")
    for row in as_train_sets_it["rows"]:
        start = f"| a training step, {row['tiles']} tiles |"
        (line,) = (x for x in speed_page() if x.startswith(start))
        assert shown(row) in line
    for row in as_train_sets_it["rows"] + huge["rows"]:
        rates = f"| {row['tiles']} | {row['ours']:,} | {row['original']:,} |"
        (line,) = (x for x in details.splitlines() if rates in x)
        assert f"{row['ratio']:.2f}" in line
        assert f"| {row['low']:.2f} to {row['high']:.2f} |" in line


def test_the_original_trains_the_shape_of_ours():
    tree = ast.parse(original.WORKER.read_text("utf-8"))
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            values = ast.literal_eval(node.value)
            names = [name.id for name in node.targets[0].elts]
            constants |= dict(zip(names, values, strict=True))
    for tiles, each in original.TILES.items():
        config = steps.config_of(original.SETTING, original.SETTING.arms[str(tiles)])
        model, train = config.model, config.train
        assert constants == {
            "LAYERS": model.n_layers,
            "D_MODEL": model.d_model,
            "HEADS": model.n_heads,
            "CHARACTERS": model.vocab_size,
            "BATCH": train.batch_size,
            "CONTEXT": model.context,
        }
        assert (model.ffn, model.num_tiles, model.tiles_per_cluster) == (
            "hierarchical",
            tiles,
            each,
        )
        assert (model.tiles_per_token, model.expansion) == (1, 4)
        assert (train.optimizer, train.clip, model.dropout) == ("adamw", 1.0, 0.0)


def test_the_process_of_the_original_answers_or_says_how_it_ended(
    tmp_path, monkeypatch
):
    worker = tmp_path / "worker.py"
    worker.write_text(ANSWERS)
    monkeypatch.setattr(original, "WORKER", worker)
    theirs = original.Original(sys.executable, tmp_path, 64)
    assert theirs.about == {"arguments": [str(tmp_path), "64", "8"]}
    assert [theirs(), theirs()] == [0.5, 0.5]
    theirs.close()
    worker.write_text("raise SystemExit(3)")
    with pytest.raises(RuntimeError, match=r"worker.py must answer.*status 3"):
        original.Original(sys.executable, tmp_path, 64)


@pytest.mark.slow
def test_steps_are_timed_in_turn():
    setting = steps.SETTINGS["shakespeare-128"]
    small = setting._replace(flags=f"{setting.flags} {SMALL}")
    taken = steps.measure(small, 2)
    assert list(taken) == list(setting.arms)
    assert all(0 < min(row["range"]) <= row["seconds"] for row in taken.values())
    first, *_ = taken.values()
    assert first["first_is"]["ratio"] == 1


def test_the_kernels_page_has_the_modelled_steps():
    page = (steps.ROOT / "kernels" / "README.md").read_text("utf-8")
    rows = json.loads(modelled.PATH.read_text("utf-8"))["rows"]
    assert [row["tiles"] for row in rows] == [16] * 3 + [64] * 3
    assert [row["what"] for row in rows] == list(WAYS) * 2
    for trix, equal, active in (rows[:3], rows[3:]):
        rest = [row["modelled_us"] - row["attention_us"] for row in (trix, equal)]
        cells = [
            f"{trix['tiles']}",
            *(f"{row['modelled_us'] / 1e3:.1f}" for row in (trix, equal, active)),
            f"{trix['attention_us'] / 1e3:.1f}",
            f"**{equal['modelled_us'] / trix['modelled_us']:.2f}**",
            f"{rest[1] / rest[0]:.2f}",
        ]
        assert f"| {' | '.join(cells)} |" in page
