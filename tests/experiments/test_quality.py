"""The whole instrument, shrunken: queue, interruption, measuring, protocol, report."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.quality import (
    arms,
    design,
    measure,
    patches,
    protocol,
    report,
    results,
    run,
)
from experiments.quality.design import SETTINGS, Step
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import TrainConfig, TransformerConfig
from trix_jax.lm.train import loop
from trix_jax.lm.train.optimizer import MUON_RMS, make_optimizer
from trix_jax.lm.train.step import init_state
from trix_jax.nn.transformer import TransformerLM

SMALL = (
    "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.context 16 --train.steps 3 "
    "--train.eval-every 2 --train.batch-size 2 --train.eval-batch-size 8"
)
KEYS = {
    "setting", "arm", "tiles_per_token", "seed", "learning_rate", "steps", "tokens", "val_loss",
    "params_total", "ffn_active", "ffn_bits", "min_entropy_share", "dead_tiles", "seconds",
    "command", "git_commit",
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("What is written twice is read once.\n" * 60, encoding="utf-8")
    return path


def test_committed_results_have_the_keys_that_others_rely_on():
    for path in sorted(run.RESULTS.glob("*.json")):
        if path.stem not in SETTINGS:
            continue
        lines = results.read(path)
        assert len({results.key(line) for line in lines}) == len(lines)
        for line in lines:
            assert line.keys() >= KEYS, line["arm"]
            assert "width" in line or {"num_tiles", "tile_width"} <= line.keys()
            assert SETTINGS[path.stem].arm(line["arm"])
            assert line["setting"] == path.stem


def test_committed_report_is_what_the_committed_results_give(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for path in run.RESULTS.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    report.main(["--folder", str(tmp_path)])
    found = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    committed = (run.RESULTS.parent / "REPORT.md").read_text(encoding="utf-8")
    assert found == committed, "run `python -m experiments.quality.report`"
    for name in re.findall(r"\(results/(\S+\.png)\)", committed):
        assert (folder / name).exists()
        assert (run.RESULTS / name).exists()


def test_original_protocol_takes_its_windows():
    whole = "".join(chr(65 + i % 26) for i in range(1_000_000))
    taken = protocol.characters(whole)
    assert taken[:50_128] == whole[:50_128]
    assert taken[50_128:] == whole[900_000:903_328]


@pytest.mark.slow
def test_everything_shrunken_from_queue_to_report(text, tmp_path, monkeypatch):
    base = design.SHAKESPEARE.arm(arms.BEST)
    hashed = design.SHAKESPEARE.arm(f"{arms.HIDDEN}-hash")
    ablation = arms.variant("sign", "--model.routing.signature sign")
    way = arms.patched("half-hashed", tuned=True, of=arms.HIDDEN)
    small = design.SHAKESPEARE._replace(
        groups={
            "dense-curve": (arms.dense(8), arms.dense(16)),
            "arms": (base,),
            "routes": (base, hashed),
            "ablations": (ablation,),
            "on-the-way": (arms.hidden, way),
        },
        also=(),
        plan=(
            Step("dense-curve", 0),
            Step("routes", 0),
            Step("ablations", 1),
            Step("on-the-way", 0),
        ),
    )
    monkeypatch.setitem(SETTINGS, small.name, small)
    flags = f"{SMALL} --data.source text --data.tokenizer char"
    argv = [small.name, "--data", str(text), "--runs", str(tmp_path / "runs")]
    argv += ["--results", str(tmp_path / "results"), "--flags", flags]
    assert run.main(argv) == 0
    path = tmp_path / "results" / f"{small.name}.json"
    lines = results.read(path)
    names = ["dense-8", "dense-16", base.name, hashed.name, ablation.name]
    names += [arms.HIDDEN, way.name]
    assert sorted(line["arm"] for line in lines) == sorted(names)
    for line in lines:
        assert line.keys() >= KEYS
        assert 0 < line["val_loss"] < 10

    # A run that is in the results is done, whatever the folder of runs holds.
    forgotten = lines.pop(0)
    assert forgotten["arm"] == "dense-16"
    path.write_text(json.dumps(lines), encoding="utf-8")
    assert run.main(argv) == 0
    again = [
        line
        for line in results.read(path)
        if results.key(line) == results.key(forgotten)
    ]
    assert again[0]["val_loss"] == forgotten["val_loss"]

    runs = tmp_path / "runs" / small.name
    doing = tmp_path / "results" / "doing.json"
    directories = [
        str(runs / f"{base.name}-lr0.002-seed42"),
        str(runs / f"{hashed.name}-lr0.002-seed42"),
    ]
    dense = str(runs / "dense-16-lr0.004-seed42")
    store = ["--data", str(runs / "data")]
    measure.main([*directories, "--reference", dense, *store, "--out", str(doing)])
    entries = {entry["arm"]: entry for entry in json.loads(doing.read_text())}
    assert entries[hashed.name]["layers"][0]["entropy_given_token"] == 0
    evaluated = next(line["val_loss"] for line in lines if line["arm"] == base.name)
    assert entries[base.name]["val_loss"] == pytest.approx(evaluated, rel=1e-5)

    report.main(["--folder", str(tmp_path)])
    page = (tmp_path / "REPORT.md").read_text(encoding="utf-8")
    for heading in (
        "The instrument",
        "Who chooses",
        "Ablations",
        "What routing does",
        "The sweeps",
    ):
        assert heading in page
    assert "nan" not in page
    assert (tmp_path / "results" / f"{small.name}-width.png").stat().st_size > 10_000


def test_every_patch_is_an_ablation_and_what_it_replaces_comes_back():
    planned = [
        *design.SHAKESPEARE.groups["on-the-way"],
        *design.SHAKESPEARE.groups["lookups"],
        *design.SHAKESPEARE_MUON.groups["ablations"],
    ]
    assert {arm.patch for arm in planned if arm.patch} == set(patches.PATCHES)
    for name, replaced in patches.PATCHES.items():
        before = [getattr(owner, attribute) for owner, attribute, _ in replaced]
        with patches.applied(name):
            for (owner, attribute, new), old in zip(replaced, before, strict=True):
                assert getattr(owner, attribute) is new is not old
        assert [getattr(owner, attribute) for owner, attribute, _ in replaced] == before


LOOKUPS = sorted({arm.patch for arm in arms.LOOKUPS if arm.patch})


def two_steps(name, ffn="sparse"):
    """Parameters after two steps with a patch, by what trains a run and counts its cost."""
    model = TransformerConfig(
        ffn=ffn, vocab_size=7, context=8, d_model=16, n_layers=1, n_heads=2,
        num_tiles=4, tiles_per_cluster=2, tiles_per_token=2 if ffn == "sparse" else 1,
    )  # fmt: skip
    optimizer = "muon" if ffn == "sparse" else "adamw"
    config = TrainConfig(optimizer=optimizer, warmup_steps=0, steps=9)
    with patches.applied(name):
        state = init_state(TransformerLM(model), make_optimizer(config), 0)
        step = loop._compiled_step(model, config, tuple(jax.devices()[:1]), "jit")
        for key in jax.random.split(jax.random.key(1)):
            state, _ = step(state, jax.random.randint(key, (1, 3, 9), 0, 7))
        assert costs(model).ffn_bits > 0
    return jax.tree.leaves(state.params)


def test_muon_on_whole_layers_makes_updates_of_the_size_it_makes_on_tiles():
    shapes = {"up": (16, 32, 8), "down": (16, 8, 32)}
    params = {
        "tiles": {
            name: {"kernel": jax.random.normal(jax.random.key(0), shape)}
            for name, shape in shapes.items()
        }
    }
    config = TrainConfig(optimizer="muon", warmup_steps=0, weight_decay=0.0)
    for patch in (None, "whole"):
        with patches.applied(patch):
            muon = make_optimizer(config)
            updates, _ = muon.update(params, muon.init(params), params)
        for update in jax.tree.leaves(updates):
            size = jnp.sqrt(jnp.square(update).mean()) / config.learning_rate
            assert 0.8 * MUON_RMS < size < 1.2 * MUON_RMS, (patch, update.shape)


@pytest.mark.slow
def test_every_patch_changes_what_is_trained_and_nothing_of_it_stays():
    """One process, as in a queue: a model and settings that are the same for all."""
    seen = [two_steps(None)]
    for name in patches.PATCHES:
        if name in LOOKUPS:
            continue
        found = two_steps(name)
        assert all(np.isfinite(leaf).all() for leaf in found), name
        for other in seen:
            pairs = zip(found, other, strict=True)
            assert not all(np.allclose(a, b, atol=1e-6) for a, b in pairs), name
        seen.append(found)
    again = two_steps(None)
    assert all(np.array_equal(a, b) for a, b in zip(seen[0], again, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKUPS)
def test_patches_of_the_lookup(name):
    plain, found = (two_steps(patch, "lookup") for patch in (None, name))
    assert all(np.isfinite(leaf).all() for leaf in found)
    if name.startswith("four"):
        assert len(found) > 2 * len(plain)
    elif name == "linear":  # no splines, no second product of the compressor
        assert len(found) < len(plain)
    else:
        pairs = zip(found, plain, strict=True)
        assert not all(np.allclose(a, b, atol=1e-6) for a, b in pairs)


@pytest.mark.slow
def test_original_protocol_shrunken(text, tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "TRAIN_WINDOWS", 600)
    monkeypatch.setattr(protocol, "VAL_WINDOWS", 64)
    monkeypatch.setattr(protocol, "CONTEXT", 16)
    monkeypatch.setattr(protocol, "ARMS", {"sparse-4": 19.26})
    argv = ["--data", str(text), "--runs", str(tmp_path), "--results", str(tmp_path)]
    protocol.main([*argv, "--flags", f"{SMALL} --train.steps 4"])
    found = json.loads((tmp_path / "original-protocol.json").read_text())
    assert [line["arm"] for line in found] == ["sparse-4"]
    for line in found:
        assert 1 < line["best_ppl"] <= line["final_ppl"] * 1.0001 < 100
        assert 1 < line["bigram_ppl"] < line["best_ppl"] * 10
    protocol.main(argv)  # nothing left to do
    assert json.loads((tmp_path / "original-protocol.json").read_text()) == found
