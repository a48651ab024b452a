"""A kill between any two file operations: what is on the disk at each such moment is
copied, and gone on with.

SIGKILL leaves exactly what has been written so far, so a copy of the directory before
an operation is what a process killed there would have left. Python tells of its file
operations by audit events; those of TensorStore's threads fall between them, and
`test_checkpoint_failures.py` kills real processes at random moments on top.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import threading

import jax
import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.train import metrics, milestone
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.step_log import StepLog

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
BETWEEN = "trix.between"  # a moment that no file operation marks
EVENTS = {BETWEEN, "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


class Watch:
    """Copies a directory before every operation that changes it, each state once."""

    def __init__(self):
        self._lock, self._mine = threading.Lock(), threading.local()
        self._watched = None
        self.moments = 0

    def hook(self, event, args):
        if self._watched is None or getattr(self._mine, "busy", False):
            return
        changes = event in EVENTS or (event == "open" and args[2] & WRITES)
        if changes and self._is_inside(args[0]):
            self._mine.busy = True
            try:
                with self._lock:
                    self._copy()
            finally:
                self._mine.busy = False

    def _is_inside(self, path):
        is_path = isinstance(path, str | bytes | os.PathLike)
        return is_path and os.fsdecode(path).startswith(str(self._watched))

    def _copy(self):
        self.moments += 1
        target = self._copies / f"{self.moments:05d}"
        for _ in range(20):
            with contextlib.suppress(shutil.Error, OSError):  # another thread writes
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(self._watched, target, symlinks=True)
                break
        if (state := digest(target)) in self._seen:
            shutil.rmtree(target)
        self._seen.add(state)

    @contextlib.contextmanager
    def of(self, directory, copies):
        self._copies, self._seen, self.moments = copies, set(), 0
        copies.mkdir()
        self._watched = directory
        try:
            yield self
        finally:
            self._watched = None


def digest(directory):
    found = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        found.update(str(path.relative_to(directory)).encode() + b"\0")
        if path.is_file():
            found.update(path.read_bytes() + b"\0")
    return found.hexdigest()


@pytest.fixture(scope="module")
def watch():
    watch = Watch()
    sys.addaudithook(watch.hook)  # stays, idle, until the process ends
    return watch


def quiet(_):
    pass


def states_in(copies):
    return sorted(copies.iterdir())


@pytest.mark.slow
def test_kill_at_any_point_of_a_save_loses_no_step(tmp_path, watch):
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoint.save(run, step, {"w": np.full(50, step)}, {"val_loss": 3.0 - step})
    with watch.of(run, tmp_path / "copies"):
        checkpoint.save(run, 3, {"w": np.full(50, 3)}, {"val_loss": 2.5})  # prunes 1
        checkpoint.save(run, 3, {"w": np.full(50, 3)}, {"val_loss": 2.5})  # replaces
    states = states_in(tmp_path / "copies")
    assert len(states) > 15
    for state in states:
        said = []
        newest = checkpoint.newest_good(state, report=said.append)
        assert (newest in (2, 3), said) == (True, [])
        for step in checkpoint.steps(state):
            tree, _ = checkpoint.restore(state, step, {"w": np.zeros(50, int)})
            assert (tree["w"] == step).all()
        checkpoint.save(state, 4, {"w": np.full(50, 4)}, {})
        names = [path.name for path in state.iterdir()]
        assert sorted(names) == [f"{step:08d}" for step in checkpoint.steps(state)]
    print(f"{len(states)} kills in {watch.moments} moments of two saves: no step lost")


@pytest.mark.slow
def test_kill_at_any_point_of_prepare_is_gone_on_with(tmp_path, watch, corpus):
    config = DataConfig(
        source="text", path=str(corpus), tokenizer="bpe", vocab_size=300
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    with watch.of(folder, tmp_path / "copies"):
        whole = prepare(config, folder / "data", quiet)
    states = states_in(tmp_path / "copies")
    assert len(states) > 5
    for state in states:
        again = prepare(config, state / "data", quiet)
        assert again.fingerprint == whole.fingerprint
        assert [path.name for path in state.iterdir()] == ["data"]
    print(f"{len(states)} kills in {watch.moments} moments of a preparation")


def story(run):
    """What a run says of itself, but for time and memory."""
    own = {"tokens_per_second", "memory_bytes", "seconds"}
    lines = list(metrics.read(run / "metrics.jsonl"))
    lines.append(json.loads((run / "summary.json").read_text()))
    return [{k: v for k, v in line.items() if k not in own} for line in lines]


def files_of(run):
    """All names but the random ones that TensorStore gives."""
    names = (path.relative_to(run) for path in run.rglob("*"))
    return {str(name) for name in names if "state" not in name.parts}


def arrays_of(run):
    """What a run's checkpoints hold, by step."""
    steps = checkpoint.steps(run / "checkpoints")
    return {
        step: checkpoint.restore_arrays(run / "checkpoints", step) for step in steps
    }


def assert_same_arrays(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_kill_at_any_point_of_a_run_is_gone_on_with_bit_for_bit(
    tmp_path, watch, tiny_config, one_device, monkeypatch
):
    """From the first folder through preparation, steps, evaluations and saves to the
    summary.
    """
    more = dataclasses.replace(tiny_config.train, checkpoint_every=4)
    config = dataclasses.replace(tiny_config, train=more)
    whole, sound = tmp_path / "whole", StepLog.flush

    def flush(log):
        sound(log)
        sys.audit(BETWEEN, str(whole))

    with watch.of(whole, tmp_path / "copies"), monkeypatch.context() as patch:
        patch.setattr(StepLog, "flush", flush)
        whole.mkdir()
        train(config, whole, devices=one_device, report=quiet)
    states = states_in(tmp_path / "copies")
    assert len(states) > 80
    expected = story(whole), files_of(whole)
    arrays = arrays_of(whole)
    for state in states:
        train(config, state, devices=one_device, report=quiet)
        assert (story(state), files_of(state)) == expected
        assert_same_arrays(arrays_of(state), arrays)
        shutil.rmtree(state)
    print(f"{len(states)} kills in {watch.moments} moments: no step lost")


@pytest.mark.slow
def test_kill_at_any_point_of_an_owed_evaluation_is_gone_on_with(
    tmp_path, watch, tiny_config, one_device, run_dir, monkeypatch
):
    """That of the last step, so that the rest of the run is the evaluation, its save and
    the summary.
    """
    run, sound = tmp_path / "run", milestone.evaluate

    def evaluate(model, variables, store, batch_size, progress, **more):
        if progress == 1:
            raise MemoryError
        return sound(model, variables, store, batch_size, progress, **more)

    with monkeypatch.context() as patch:
        patch.setattr(milestone, "evaluate", evaluate)
        with pytest.raises(MemoryError):
            train(tiny_config, run, devices=one_device, report=quiet)
    with watch.of(run, tmp_path / "copies"):
        train(tiny_config, run, devices=one_device, report=quiet)
    states = states_in(tmp_path / "copies")
    assert len(states) > 15
    expected, arrays = (story(run_dir), files_of(run_dir)), arrays_of(run_dir)
    for state in [run, *states]:
        train(tiny_config, state, devices=one_device, report=quiet)
        assert (story(state), files_of(state)) == expected
        assert_same_arrays(arrays_of(state), arrays)
    print(f"{len(states)} kills in {watch.moments} moments of an owed evaluation")
