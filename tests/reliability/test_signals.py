"""Signals and the trigger file, at every stage of a run, in this process."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from trix_jax.cli import main
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import prepare, store
from trix_jax.lm.signals import Interrupted, Signals
from trix_jax.lm.train import loop, metrics, milestone

pytestmark = pytest.mark.slow

SIGNALS = [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]


def quiet(_):
    pass


def send(number):
    os.kill(os.getpid(), number)


def assert_same_run(a, b, step=10):
    trees = [checkpoint.restore_arrays(run / "checkpoints", step) for run in (a, b)]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(x, y)
    own = ("tokens_per_second", "memory_bytes")
    kept = [
        [
            {k: v for k, v in line.items() if k not in own}
            for line in metrics.read(run / "metrics.jsonl")
        ]
        for run in (a, b)
    ]
    assert kept[0] == kept[1]


def with_signal_before_batch(monkeypatch, batch, number):
    sound = loop.train_batches

    def batches(split, *, start_step, **kwargs):
        for i, value in enumerate(sound(split, start_step=start_step, **kwargs)):
            if start_step + i == batch:
                send(number)
            yield value

    monkeypatch.setattr(loop, "train_batches", batches)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("batch", [0, 6])
def test_signal_in_warmup_or_training_saves_and_the_same_call_goes_on(
    tiny_config, one_device, run_dir, tmp_path, monkeypatch, batch, number
):
    run, handler = tmp_path / "run", signal.getsignal(number)
    with monkeypatch.context() as patch:
        with_signal_before_batch(patch, batch, number)
        with pytest.raises(Interrupted, match=f"after step {batch + 1}, saved"):
            loop.train(tiny_config, run, devices=one_device, report=quiet)
    assert checkpoint.resolve(run / "checkpoints", "latest") == batch + 1
    assert signal.getsignal(number) == handler  # SIG_IGN in a shell's background job
    loop.train(tiny_config, run, devices=one_device, report=quiet)
    assert_same_run(run, run_dir)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_in_an_evaluation_saves_and_the_same_call_goes_on(
    tiny_config, one_device, run_dir, tmp_path, monkeypatch, number
):
    run, sound = tmp_path / "run", milestone.evaluate

    def evaluate(*args, **kwargs):
        send(number)
        return sound(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(milestone, "evaluate", evaluate)
        with pytest.raises(Interrupted, match="after step 5, saved"):
            loop.train(tiny_config, run, devices=one_device, report=quiet)
    loop.train(tiny_config, run, devices=one_device, report=quiet)
    assert_same_run(run, run_dir)


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_in_preparation_leaves_nothing_and_the_same_call_goes_on(
    tiny_config, one_device, run_dir, tmp_path, number
):
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match="before its first step"):
        loop.train(tiny_config, run, devices=one_device, report=lambda _: send(number))
    assert not run.exists()
    loop.train(tiny_config, run, devices=one_device, report=quiet)
    assert_same_run(run, run_dir)


def test_signal_in_restore_changes_nothing(tiny_config, one_device, run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    shutil.rmtree(run / "checkpoints" / "00000010")

    def stop(text):
        assert "resuming" in text
        send(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGTERM before its first step"):
        loop.train(tiny_config, run, devices=one_device, report=stop)
    assert checkpoint.steps(run / "checkpoints") == [5]
    loop.train(tiny_config, run, devices=one_device, report=quiet)
    assert_same_run(run, run_dir)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_of_either_kind_acts_as_it_did_before(second):
    seen = []
    before = {
        number: signal.signal(number, lambda number, _: seen.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        with Signals() as signals:
            send(signal.SIGTERM)
            assert (signals.caught, seen) == ("SIGTERM", [])
            send(second)
            assert (signals.caught, seen) == ("SIGTERM", [second])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_second_signal_ends_a_real_run_that_does_not_come_to_its_save(
    corpus, user_env, tmp_path
):
    """A step of a process that is stuck: the first signal is noted, the second kills."""
    stuck = (
        "import functools, sys, time; from trix_jax.lm.train import loop as train; from trix_jax.cli import main\n"
        "stuck = lambda *_: lambda *_: (print('stuck', flush=True), time.sleep(60))\n"
        "train._compiled_step = functools.lru_cache(stuck)\n"
        "sys.exit(main())"
    )
    argv = ["train", "--workdir", tmp_path / "run", "--data.path", corpus]
    argv += ["--model.context", "16", "--model.d-model", "16", "--model.n-layers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", stuck, *map(str, argv)],
        env=user_env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        while "stuck" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_prepare_verb_stopped_exits_75_and_goes_on(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 20)
    argv = ["prepare", "--workdir", str(tmp_path / "store"), "--data.path", str(text)]
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            return send(signal.SIGTERM)

        patch.setattr(store.SplitWriter, "append", stop)
        assert main(argv) == 75
    assert "The same command goes on" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
    assert main(argv) == 0


def test_trigger_file_asks_for_one_checkpoint(
    tiny_config, one_device, run_dir, tmp_path, monkeypatch
):
    run, sound = tmp_path / "run", loop.train_batches
    messages = []

    def batches(split, **kwargs):
        for i, value in enumerate(sound(split, **kwargs)):
            if i == 6:
                (run / loop.TRIGGER).touch()
            yield value
            if i == 6:
                assert checkpoint.steps(run / "checkpoints") == [5, 7]

    monkeypatch.setattr(loop, "train_batches", batches)
    loop.train(tiny_config, run, devices=one_device, report=messages.append)
    assert not (run / loop.TRIGGER).exists()
    assert sum("step 7 is saved" in text for text in messages) == 1
    assert_same_run(run, run_dir)


def failing_at(step, config):
    """An evaluation for which there is no memory at a step."""
    sound = milestone.evaluate

    def evaluate(*args, **kwargs):
        if args[4] == step / config.train.steps:
            raise MemoryError("no memory")
        return sound(*args, **kwargs)

    return evaluate


def stopped(config, run, devices, monkeypatch, step, how):
    """A run whose evaluation at a step was due and not made."""
    with monkeypatch.context() as patch:
        patch.setattr(milestone, "evaluate", failing_at(step, config))
        if how == "signal":
            with_signal_before_batch(patch, step - 1, signal.SIGTERM)
        told = {"signal": (Interrupted, f"after step {step}, saved")}
        error, match = told.get(how, (MemoryError, "no memory"))
        with pytest.raises(error, match=match):
            loop.train(config, run, devices=devices, report=quiet)
    meta = checkpoint.read_meta(run / "checkpoints", step)
    assert (meta["val_loss"], meta["evaluation_owed"]) == (None, True)


def notes_of(run, step=10):
    meta = checkpoint.read_meta(run / "checkpoints", step)
    summary = json.loads((run / "summary.json").read_text())
    return [{k: v for k, v in x.items() if k != "seconds"} for x in (meta, summary)]


@pytest.mark.parametrize("how", ["signal", "failure"])
@pytest.mark.parametrize("step", [5, 10])
def test_evaluation_that_was_not_made_is_the_first_thing_when_the_run_goes_on(
    tiny_config, one_device, run_dir, tmp_path, monkeypatch, step, how
):
    run = tmp_path / "run"
    stopped(tiny_config, run, one_device, monkeypatch, step, how)
    loop.train(tiny_config, run, devices=one_device, report=quiet)
    assert_same_run(run, run_dir)
    assert_same_run(run, run_dir, 5)
    assert notes_of(run) == notes_of(run_dir)
    assert notes_of(run, 5) == notes_of(run_dir, 5)


def test_owed_evaluation_that_is_logged_and_not_saved_is_logged_once(
    tiny_config, one_device, run_dir, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    stopped(tiny_config, run, one_device, monkeypatch, 5, "failure")

    def full(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(milestone, "save", full)
        with pytest.raises(OSError, match="no space"):
            loop.train(tiny_config, run, devices=one_device, report=quiet)
    *_, last = metrics.read(run / "metrics.jsonl")
    assert (last["event"], last["step"]) == ("eval", 5)
    loop.train(tiny_config, run, devices=one_device, report=quiet)
    assert_same_run(run, run_dir)


def test_owed_evaluation_on_other_data_is_not_made(
    tiny_config, one_device, corpus, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    stopped(tiny_config, run, one_device, monkeypatch, 5, "failure")
    (tmp_path / "other.txt").write_text(corpus.read_text()[::-1])
    data = dataclasses.replace(tiny_config.data, path=str(tmp_path / "other.txt"))
    prepare(data, tmp_path / "store", quiet)
    data = dataclasses.replace(data, path=str(tmp_path / "store"))
    config = dataclasses.replace(tiny_config, data=data)
    loop.train(config, run, devices=one_device, other_data=True, report=quiet)
    lines = metrics.read(run / "metrics.jsonl")
    assert [line["step"] for line in lines if line["event"] == "eval"] == [10]
