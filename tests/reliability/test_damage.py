"""Every file of a run damaged, one at a time: the same numbers come out, or a sentence
that names the file.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint, step_files
from trix_jax.lm.data import open_store, prepare
from trix_jax.lm.serve.load import load_run, open_run_data
from trix_jax.lm.train import metrics
from trix_jax.lm.train.evaluate import evaluate
from trix_jax.lm.train.loop import train


def flip_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_high_bit_near_the_end(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-len(data) // 10] ^= 0x40
    path.write_bytes(data)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


HARMS = [flip_middle, flip_high_bit_near_the_end, halve, empty, Path.unlink]
LOGS = {
    "metrics.jsonl",
    "env.json",
    "summary.json",
}  # no checksum; nothing computes from them


def quiet(_):
    pass


def files_of(run: Path, *parts: str) -> list[Path]:
    found = (p.relative_to(run) for part in parts for p in (run / part).rglob("*"))
    return sorted(name for name in found if (run / name).is_file())


def assert_same_step(a: Path, b: Path, step: int) -> None:
    trees = [checkpoint.restore_arrays(run / "checkpoints", step) for run in (a, b)]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(x, y)


def loss_of(run: Path) -> tuple[int, float]:
    step = checkpoint.resolve(run / "checkpoints", "latest", report=quiet)
    model, variables, _ = load_run(run)
    return step, evaluate(model, variables, open_run_data(run)).val_loss


@pytest.fixture(scope="module")
def losses(run_dir):
    """The validation loss of every step of the sound run."""
    found = {}
    for step in checkpoint.steps(run_dir / "checkpoints"):
        model, variables, _ = load_run(run_dir, step)
        found[step] = evaluate(model, variables, open_run_data(run_dir)).val_loss
    return found


def attempt(action: Callable, *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """The message of the ValueError that an action ends in, or "" and its result."""
    try:
        return "", action(*args, **kwargs)
    except ValueError as error:
        return str(error), None


@pytest.mark.slow
@pytest.mark.parametrize("part", ["checkpoints/00000010", "data", "."])
def test_any_damage_to_a_file_gives_the_same_numbers_or_names_it(
    tiny_config, one_device, run_dir, losses, tmp_path, part
):
    inside = files_of(run_dir, part)
    if part == ".":
        inside = [Path(name.name) for name in inside if len(name.parts) == 1]
    outcomes = {"recovered": 0, "refused": 0, "harmless": 0}
    for number, victim in enumerate(inside):
        # A checkpoint has many files of a kind: each meets every other harm.
        for harm in HARMS[number % 2 :: 2] if "checkpoints" in part else HARMS:
            if victim.name in LOGS and harm in HARMS[:2]:
                continue
            if not (run_dir / victim).stat().st_size and harm is not Path.unlink:
                continue
            hurt = tmp_path / "hurt"
            shutil.copytree(run_dir, hurt)
            harm(hurt / victim)
            case = f"{victim}, {harm.__name__}"
            error, found = attempt(loss_of, hurt)
            assert victim.name in error or found in losses.items(), (case, error)
            messages = []
            devices, report = one_device, messages.append
            error, _ = attempt(train, tiny_config, hurt, devices=devices, report=report)
            if error:
                assert victim.name in error, (case, error)
                outcomes["refused"] += 1
            else:
                assert_same_step(hurt, run_dir, 10)
                said = any(victim.name in message for message in messages)
                outcomes["recovered" if said else "harmless"] += 1
            shutil.rmtree(hurt)
    print(f"{part}: {len(inside)} files, {sum(outcomes.values())} faults, {outcomes}")
    assert outcomes["recovered" if "checkpoints" in part else "refused"] > 0


def test_config_beside_a_checkpoint_is_not_believed_when_it_was_changed(
    run_dir, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("score_scale: 1.0", "score_scale: 3.0")
    )
    with pytest.raises(ValueError, match=r"score_scale was 1.0 and is 3.0"):
        load_run(run)


def test_other_tokenizer_beside_a_checkpoint_is_refused(run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    path = run / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be the tokenizer"):
        load_run(run)


def test_run_whose_checkpoints_were_all_set_aside_is_not_restarted(
    tiny_config, one_device, run_dir, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    for step in checkpoint.steps(run / "checkpoints"):
        checkpoint.set_aside(run / "checkpoints", step)
    with pytest.raises(ValueError, match="no checkpoint but one that was set aside"):
        train(tiny_config, run, devices=one_device, report=quiet)


def test_finished_run_whose_checkpoints_are_gone_is_not_written_over(
    tiny_config, one_device, run_dir, tmp_path
):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    shutil.rmtree(run / "checkpoints")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    other = dataclasses.replace(tiny_config, seed=7)
    for config in (tiny_config, other):
        with pytest.raises(ValueError, match="a finished run whose checkpoints are"):
            train(config, run, devices=one_device, report=quiet)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert after | {".lock": b""} == before | {".lock": b""}


def test_run_without_a_checkpoint_yet_starts_at_0_and_says_so(
    tiny_config, one_device, run_dir, tmp_path
):
    run, messages = tmp_path / "run", []
    shutil.copytree(run_dir, run)
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()  # written at the end
    train(tiny_config, run, devices=one_device, report=messages.append)
    assert any("it starts at step 0" in message for message in messages)
    assert_same_step(run, run_dir, 10)


def test_other_data_is_refused_unless_asked_for(
    tiny_config, one_device, run_dir, tmp_path
):
    run, corpus = tmp_path / "run", tmp_path / "other.txt"
    shutil.copytree(run_dir, run)
    shutil.rmtree(run / "checkpoints" / "00000010")
    shutil.rmtree(run / "data")
    text = Path(tiny_config.data.path).read_text()
    corpus.write_text(text[1000:] + text[:1000])
    data = dataclasses.replace(tiny_config.data, path=str(corpus))
    config = dataclasses.replace(tiny_config, data=data)
    with pytest.raises(ValueError, match="was trained on other data: its fingerprint"):
        train(config, run, devices=one_device, report=quiet)
    done = train(config, run, devices=one_device, other_data=True, report=quiet)
    assert done["steps"] == 10


@pytest.mark.slow
def test_other_data_compares_nothing_with_that_of_before(
    tiny_config, one_device, run_dir, tmp_path
):
    """Validation of another length, and a record on the former data that none beats."""
    run, corpus = tmp_path / "run", tmp_path / "other.txt"
    shutil.copytree(run_dir, run)
    shutil.rmtree(run / "checkpoints" / "00000010")
    text = Path(tiny_config.data.path).read_text()
    corpus.write_text(text[1000:] + text[:1500])
    data = dataclasses.replace(tiny_config.data, path=str(corpus))
    prepare(data, tmp_path / "store", quiet)
    data = dataclasses.replace(data, path=str(tmp_path / "store"))
    config = dataclasses.replace(tiny_config, data=data)
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    (first, _) = (line for line in lines if line["event"] == "eval")
    first["val_loss"] = 0.1
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = checkpoint.read_meta(run / "checkpoints", 5)
    _change_meta(run, 5, meta | {"val_loss": 0.1, "best_val_loss": 0.1})
    done = train(config, run, devices=one_device, other_data=True, report=quiet)
    *_, last = (line for line in metrics.read(log) if line["event"] == "eval")
    assert last["routing_stability"] == []
    assert done["best_val_loss"] == last["val_loss"] > 0.1
    assert done["data_since"] == 5
    windows = len(open_store(tmp_path / "store").train) // config.model.context
    assert last["epochs"] == 5 * config.train.batch_size / windows
    steps = run / "checkpoints"
    assert checkpoint.read_meta(steps, 10)["best_val_loss"] == last["val_loss"]
    assert checkpoint.resolve(steps, "best") == 10
    (run / "summary.json").unlink()  # a kill before the summary: the same again
    assert train(config, run, devices=one_device, report=quiet)["best_val_loss"] > 0.1


def _change_meta(run: Path, step: int, meta: dict[str, Any]) -> None:
    """Gives a step other notes, under a manifest that is right."""
    path = run / "checkpoints" / f"{step:08d}"
    (path / "meta.json").write_text(json.dumps(meta))
    (path / "manifest.json").unlink()
    step_files.write_manifest(path, step)


def test_other_data_with_another_tokenizer_is_refused_and_nothing_is_overwritten(
    run_dir, tiny_config, one_device, tmp_path
):
    """Another alphabet of the same size: the ids would fit, and mean other letters."""
    run, quiet = tmp_path / "run", lambda _: None
    shutil.copytree(run_dir, run)
    own = (run / "tokenizer.json").read_bytes()
    text = Path(tiny_config.data.path).read_text()
    (tmp_path / "other.txt").write_text(text.replace("t", "T").replace("e", "E"))
    data = dataclasses.replace(tiny_config.data, path=str(tmp_path / "other.txt"))
    store = prepare(data, tmp_path / "store", quiet)
    assert store.tokenizer.vocab_size == load_run(run)[2].vocab_size
    data = dataclasses.replace(tiny_config.data, path=str(tmp_path / "store"))
    config = dataclasses.replace(tiny_config, data=data)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=r"must have the tokenizer of .*tokenizer\.json"
    ):
        train(config, run, devices=one_device, other_data=True, report=quiet)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert (run / "tokenizer.json").read_bytes() == own


def test_other_data_that_is_text_is_told_to_be_prepared_elsewhere(
    run_dir, tiny_config, one_device, tmp_path
):
    run = shutil.copytree(run_dir, tmp_path / "run")
    text = Path(tiny_config.data.path).read_text()
    (tmp_path / "other.txt").write_text(text[1000:])
    data = dataclasses.replace(tiny_config.data, path=str(tmp_path / "other.txt"))
    config = dataclasses.replace(tiny_config, data=data)
    with pytest.raises(ValueError, match=r"a store of its own: trix-jax prepare --w"):
        train(config, run, devices=one_device, other_data=True, report=quiet)
