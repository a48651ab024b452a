"""Two real processes over loopback that train one model: killed, stopped and gone on
with.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.train import metrics

pytestmark = pytest.mark.slow

STEPS = 160
FLAGS = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 16 "
    "--model.num-tiles 4 --model.tiles-per-cluster 2 --train.batch-size 8 "
    f"--train.steps {STEPS} --train.eval-every 80 --train.checkpoint-every 20"
).split()
TRIX = "import sys; from trix_jax.cli import main; sys.exit(main())"
PATIENCE = 90  # seconds within which a process must notice that another died


def start(
    run: Path,
    corpus: Path,
    env: dict[str, str],
    count: int,
    program: str = TRIX,
    more: tuple[str, ...] = (),
):
    """Starts the processes of one run, each with one CPU device."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    argv = ["train", "--workdir", run, "--data.path", corpus, *FLAGS, *more]
    argv += ["--distributed"] if count > 1 else []
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, argv)],
            env={**env, **many, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def wait_all(processes, seconds=240.0):
    """The exit codes and what was said; whoever is still there in the end is killed."""
    end, codes, said = time.monotonic() + seconds, [], []
    try:
        for process in processes:
            _, errors = process.communicate(timeout=max(1.0, end - time.monotonic()))
            codes.append(process.returncode)
            said.append(errors)
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    return codes, said


def wait_for_step(run, step, processes, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert all(process.poll() is None for process in processes)
        path = run / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in metrics.read(path)):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {seconds} seconds.")


def losses(run):
    lines = metrics.read(run / "metrics.jsonl")
    return [line["loss"] for line in lines if line["event"] == "step"]


def assert_same_bits(a, b):
    assert losses(a) == losses(b)
    trees = [checkpoint.restore_arrays(r / "checkpoints", STEPS) for r in (a, b)]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def two(corpus, user_env, place):
    """An uninterrupted run of two processes, made once."""
    run = place / "run"
    if not run.exists():
        codes, said = wait_all(start(run, corpus, user_env, 2))
        assert codes == [0, 0], said
    return run


def test_two_processes_one_killed_resumed_with_two_and_with_one(
    two, corpus, user_env, tmp_path
):
    one, run = tmp_path / "one", tmp_path / "run"
    codes, said = wait_all(start(one, corpus, user_env, 1))
    assert codes == [0], said
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-4)

    processes = start(run, corpus, user_env, 2)
    wait_for_step(run, 50, processes)
    os.kill(processes[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    codes, said = wait_all(processes, PATIENCE)
    seconds = time.monotonic() - killed
    assert codes[0] not in (0, 75), said
    assert codes[1] == -signal.SIGKILL
    newest = checkpoint.newest_good(run / "checkpoints")
    assert newest is not None
    assert newest >= 40
    print(f"the other process stopped {seconds:.1f} s after the kill; step {newest}")

    alone = tmp_path / "alone"
    shutil.copytree(run, alone)
    codes, said = wait_all(start(alone, corpus, user_env, 1))
    assert codes == [0], said
    np.testing.assert_allclose(losses(alone), losses(one), rtol=1e-4)
    codes, said = wait_all(start(run, corpus, user_env, 2))
    assert codes == [0, 0], said
    assert_same_bits(run, two)


def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_step(
    two, corpus, user_env, tmp_path
):
    run = tmp_path / "run"
    processes = start(run, corpus, user_env, 2)
    wait_for_step(run, 30, processes)
    os.kill(processes[1].pid, signal.SIGTERM)
    codes, said = wait_all(processes)
    assert codes == [75, 75], said
    assert "stopped by another process after step" in said[0]
    assert "stopped by SIGTERM after step" in said[1]
    codes, said = wait_all(start(run, corpus, user_env, 2))
    assert codes == [0, 0], said
    assert_same_bits(run, two)


def test_first_process_killed_stops_the_other(corpus, user_env, tmp_path):
    run = tmp_path / "run"
    processes = start(run, corpus, user_env, 2)
    wait_for_step(run, 25, processes)
    os.kill(processes[0].pid, signal.SIGKILL)
    codes, said = wait_all(processes, PATIENCE)
    assert codes[1] not in (0, 75), said
    assert checkpoint.newest_good(run / "checkpoints") == 20


def test_spread_tiles_give_the_same_losses_and_a_silent_process_stops_the_other(
    two, corpus, user_env, tmp_path
):
    """Stopped, not dead: its connections stay open, only the heartbeat is missing."""
    run, wait = tmp_path / "run", 10
    program = f"from trix_jax.lm import hosts; hosts.TIMEOUT_SECONDS = {wait}; {TRIX}"
    processes = start(run, corpus, user_env, 2, program, ("--shard-tiles", "2"))
    wait_for_step(run, 25, processes)
    os.kill(processes[1].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        code = processes[0].wait(PATIENCE)
        seconds = time.monotonic() - stopped
    finally:
        for process in processes:
            process.kill()
    _, said = wait_all(processes)
    assert code not in (0, 75), said
    assert checkpoint.newest_good(run / "checkpoints") == 20
    np.testing.assert_allclose(losses(run)[:20], losses(two)[:20], rtol=1e-4)
    print(f"the other process stopped {seconds:.1f} s after; heartbeat {wait} s")
