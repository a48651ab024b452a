"""The whole instrument, shrunken: a sweep, patches, measuring, the report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.quality import arms, design, measure, patches, report, run
from experiments.quality.design import SETTINGS
from trix_jax.lm import accounting
from trix_jax.lm.accounting import costs
from trix_jax.lm.config import TrainConfig, TransformerConfig
from trix_jax.lm.experiment import results
from trix_jax.lm.train import loop, step
from trix_jax.lm.train.optimizer import MUON_RMS, make_optimizer
from trix_jax.lm.train.step import init_state
from trix_jax.nn.transformer import TransformerLM

SMALL = (
    "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.context 16 --train.steps 3 "
    "--train.eval-every 2 --train.batch-size 2 --train.eval-batch-size 8"
)
# A setting that trains in minutes, for this process and those of the workers.
SHRUNKEN = """
from experiments.quality import arms, design
from experiments.quality.design import Step

base = design.SHAKESPEARE.arm("sparse-16-top4-embedding")
hashed = design.SHAKESPEARE.arm("sparse-16-top4-hash")
half = arms.patched("half-hashed", tuned=True, of=arms.hidden)
wild = arms.Arm("wild", base.flags + " --train.warmup-steps 0 --train.clip 0", 1e30)
shrunken = design.SHAKESPEARE._replace(
    groups={
        "dense-curve": (arms.dense(8), arms.dense(16)),
        "arms": (base,),
        "routes": (base, hashed),
        "ablations": (arms.variant("sign", "--model.routing.signature sign"), wild),
        "on-the-way": (arms.hidden, half),
    },
    also=(("wild", 1e30, 1),),
    order=(Step("dense-curve", 0), Step("routes", 0), Step("on-the-way", 0)),
)
"""
WORKER = f"""{SHRUNKEN}
import sys
from experiments.quality import run

design.SETTINGS["shakespeare-char"] = shrunken
sys.exit(run.main())
"""


def test_results_of_two_samplers_are_sections_of_their_own(tmp_path):
    setting = SETTINGS["stdlib-bytes"]
    old = results.read(run.RESULTS / "stdlib-bytes.json")
    new = [one._replace(sampler="epochs", val_loss=one.val_loss + 1) for one in old[:5]]
    assert run.results_of_one_sampler(old + new) == (old, "--train.sampler offsets")
    assert run.results_of_one_sampler([]) == ([], "")
    (tmp_path / "results").mkdir()
    results.write(tmp_path / "results" / "stdlib-bytes.json", old)
    alone = report.appendix(tmp_path)
    results.write(tmp_path / "results" / "stdlib-bytes.json", old + new)
    both = report.appendix(tmp_path)
    assert alone.count("\n## ") == 1
    assert both.startswith(alone.rstrip("\n"))
    assert f"## {setting.name}-epochs" in both
    assert "sampler `offsets`" in alone
    assert "sampler `epochs`" in both.removeprefix(alone.rstrip("\n"))
    assert (tmp_path / "results" / "stdlib-bytes-epochs-rates.png").is_file()
    entries = json.loads((run.RESULTS / "doing.json").read_text("utf-8"))
    entries += [entry | {"sampler": "epochs"} for entry in entries]
    (tmp_path / "results" / "doing.json").write_text(json.dumps(entries))
    first, second = [
        part for part in measure.section(tmp_path / "results") if "Sampler: " in part
    ]
    assert "Sampler: `offsets`" in first
    assert "Sampler: `epochs`" in second


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("What is written twice is read once.\n" * 60, encoding="utf-8")
    return path


def test_committed_results_are_of_arms_that_are_known():
    for name, setting in SETTINGS.items():
        for result in results.read(run.RESULTS / f"{name}.json"):
            assert setting.arm(result.arm)
            assert result.setting == name


@pytest.mark.slow
def test_committed_report_is_what_the_committed_results_give(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    for path in run.RESULTS.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    report.write(tmp_path)
    for page in ("REPORT.md", "APPENDIX.md"):
        found = (tmp_path / page).read_text(encoding="utf-8")
        committed = (run.RESULTS.parent / page).read_text(encoding="utf-8")
        assert found == committed, "run `python -m experiments.report`"
        for name in re.findall(r"\(results/(\S+\.png)\)", committed):
            assert (folder / name).exists()
            assert (run.RESULTS / name).exists()


@pytest.mark.slow
def test_two_workers_sweep_measure_and_report(text, tmp_path, user_env, monkeypatch):
    flags = f"{SMALL} --data.source text --data.tokenizer char"
    argv = [sys.executable, "-c", WORKER, "shakespeare-char", "--data", str(text)]
    argv += ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    argv += ["--flags", flags]
    where = {"env": user_env, "cwd": run.ROOT, "text": True, "stdout": subprocess.PIPE}
    workers = [subprocess.Popen(argv, **where) for _ in range(2)]
    said = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    path = tmp_path / "results" / "shakespeare-char.json"
    found = {result.arm: result for result in results.read(path)}
    base, hashed, way = (
        arms.best.name,
        arms.by_hash.name,
        f"{arms.hidden.name}-half-hashed",
    )
    assert sorted(found) == sorted(
        ["dense-8", "dense-16", base, hashed, arms.hidden.name, way, "wild"]
    )
    assert not found.pop("wild").is_finite
    assert all(0 < result.val_loss < 10 for result in found.values())
    for arm in found:  # each was made once, by one of the two
        (log,) = (tmp_path / "runs/shakespeare-char").glob(f"{arm}-lr*/log.txt")
        assert log.read_text().count("read ") == 1, log.read_text()

    # The patch was in the process of its own run and nowhere else.
    assert found[way].command.startswith("python -m experiments.quality.patched half-h")
    others = [result.command for arm, result in found.items() if arm != way]
    assert all(command.startswith("trix-jax train configs/") for command in others)
    assert found[way].val_loss != found[arms.hidden.name].val_loss

    # A run that is in the results is done, whatever the folder of runs holds.
    results.write(path, [r for r in results.read(path) if r.arm != "dense-16"])
    said = subprocess.run(argv, **where, check=True).stdout
    assert {line.split()[0].split("/")[1] for line in said.splitlines()} == {
        "dense-16-lr0.004-seed42"
    }
    again = {result.arm: result for result in results.read(path)}
    assert again["dense-16"].val_loss == found["dense-16"].val_loss
    scope = {}
    exec(SHRUNKEN, scope)
    monkeypatch.setitem(SETTINGS, "shakespeare-char", scope["shrunken"])
    _measure_and_report(tmp_path, again, base, hashed)


def _measure_and_report(folder: Path, found, base, hashed):
    runs = folder / "runs" / "shakespeare-char"
    doing = folder / "results" / "doing.json"
    dense = ["--reference", str(runs / "dense-16-lr0.004-seed42")]
    routed = [str(runs / f"{arm}-lr0.002-seed42") for arm in (base, hashed)]
    store = ["--data", str(runs / "data")]
    measure.main([*routed, *dense, *store, "--out", str(doing)])
    entries = {entry["arm"]: entry for entry in json.loads(doing.read_text())}
    assert entries[hashed]["layers"][0]["entropy_given_token"] == 0
    assert entries[base]["val_loss"] == pytest.approx(found[base].val_loss, rel=1e-5)
    page = report.appendix(folder)
    headings = (
        "The instrument",
        "Who chooses",
        "Ablations",
        "What routing does",
        "The sweeps",
    )
    assert all(heading in page for heading in headings)
    assert "nan" not in page
    width = folder / "results" / "shakespeare-char-epochs-width.png"
    assert width.stat().st_size > 10_000


def test_every_patch_is_an_arm_and_replaces_what_it_names(monkeypatch):
    asked = [
        *design.SHAKESPEARE.groups["on-the-way"],
        *design.SHAKESPEARE.groups["lookups"],
        *design.SHAKESPEARE_MUON.groups["ablations"],
    ]
    assert {arm.patch for arm in asked if arm.patch} == set(patches.PATCHES)
    for name, replaced in patches.PATCHES.items():
        with monkeypatch.context() as context:
            put_in(name, context)
            for owner, attribute, new in replaced:
                assert getattr(owner, attribute) is new
    with pytest.raises(ValueError, match="patch must be one of both, centred"):
        patches.apply("none of these")


def put_in(name, monkeypatch):
    """A patch that this process forgets again: a run's process never has to."""
    for owner, attribute, _ in patches.PATCHES.get(name, ()):
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))
    if name:
        patches.apply(name)
    loop._compiled_step.cache_clear()
    step._compiled_init.cache_clear()
    accounting._param_shapes.cache_clear()


LOOKUPS = sorted({arm.patch for arm in arms.LOOKUPS if arm.patch})


def shapes_and_program(name, monkeypatch, ffn="sparse"):
    """With a patch: the parameters, and what would be compiled to draw them and for a
    step, by what trains a run and counts its cost.
    """
    model = TransformerConfig(
        ffn=ffn, vocab_size=7, context=8, d_model=16, n_layers=1, n_heads=2,
        num_tiles=4, tiles_per_cluster=2, tiles_per_token=2 if ffn == "sparse" else 1,
    )  # fmt: skip
    optimizer = "muon" if ffn == "sparse" else "adamw"
    config = TrainConfig(optimizer=optimizer, warmup_steps=0, steps=9)
    with monkeypatch.context() as context:
        put_in(name, context)
        first = step._compiled_init(model).lower(jax.random.key(0))
        state = jax.eval_shape(
            lambda: init_state(TransformerLM(model), make_optimizer(config), 0)
        )
        train_step = loop._compiled_step(model, config, tuple(jax.devices()[:1]), "jit")
        tokens = jax.ShapeDtypeStruct((1, 3, 9), jnp.int32)
        program = first.as_text() + train_step.lower(state, tokens).as_text()
        assert costs(model).ffn_bits > 0
    return jax.tree.leaves(state.params), program


@pytest.fixture(scope="module")
def plain_lookup():
    with pytest.MonkeyPatch.context() as context:
        return shapes_and_program(None, context, "lookup")


@pytest.mark.slow
def test_muon_on_whole_layers_makes_updates_of_the_size_it_makes_on_tiles(monkeypatch):
    shapes = {"up": (16, 32, 8), "down": (16, 8, 32)}
    params = {
        "tiles": {
            name: {"kernel": jax.random.normal(jax.random.key(0), shape)}
            for name, shape in shapes.items()
        }
    }
    config = TrainConfig(optimizer="muon", warmup_steps=0, weight_decay=0.0)
    for patch in (None, "whole"):
        with monkeypatch.context() as context:
            put_in(patch, context)
            muon = make_optimizer(config)
            updates, _ = muon.update(params, muon.init(params), params)
        for update in jax.tree.leaves(updates):
            size = jnp.sqrt(jnp.square(update).mean()) / config.learning_rate
            assert 0.8 * MUON_RMS < size < 1.2 * MUON_RMS, (patch, update.shape)


@pytest.mark.slow
def test_every_patch_changes_what_is_trained(monkeypatch):
    _, plain = shapes_and_program(None, monkeypatch)
    assert shapes_and_program(None, monkeypatch)[1] == plain  # nothing else differs
    seen = {plain}
    for name in patches.PATCHES:
        if name in LOOKUPS:
            continue
        _, program = shapes_and_program(name, monkeypatch)
        assert program not in seen, name
        seen.add(program)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKUPS)
def test_patches_of_the_lookup(name, plain_lookup, monkeypatch):
    found, program = shapes_and_program(name, monkeypatch, "lookup")
    plain, plain_program = plain_lookup
    if name.startswith("four"):
        assert len(found) > 2 * len(plain)
    elif name == "linear":  # no splines, no second product of the compressor
        assert len(found) < len(plain)
    else:
        assert program != plain_program
