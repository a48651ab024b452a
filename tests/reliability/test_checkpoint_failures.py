"""Checkpoints on failing disks and in processes that are killed."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trix_jax.lm.checkpoint import checkpoint


def save_small(directory: Path, step: int, *, keep: int = 2, **meta: Any) -> Path:
    return checkpoint.save(directory, step, {"w": np.full(50, step)}, meta, keep=keep)


def run_python(
    code: str, *args: object, env: dict[str, str], **kwargs: Any
) -> subprocess.Popen:
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        textwrap.dedent(code),
        *map(str, args),
    ]
    return subprocess.Popen(command, env=env, text=True, **kwargs)


def contents(directory: Path) -> dict[str, tuple]:
    return {
        str(p.relative_to(directory)): (
            p.stat().st_mtime_ns,
            p.is_file() and p.read_bytes(),
        )
        for p in directory.rglob("*")
    }


# Failing disks and killed processes.


def test_a_full_disk_is_one_sentence_and_leaves_earlier_steps(tmp_path, capfd):
    save_small(tmp_path, 1)
    before = contents(tmp_path)
    big = {"w": np.random.default_rng(0).random(100_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        started = time.monotonic()
        with pytest.raises(
            OSError,
            match=f"Step 2 could not be saved in {tmp_path} .*: File too large$",
        ):
            checkpoint.save(tmp_path, 2, big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert time.monotonic() - started < 20
    assert contents(tmp_path) == before
    assert capfd.readouterr().err == ""


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=399)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="it needs 400 bytes and the disk has 399 left"):
        save_small(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Step 1 could not be saved in .*file"):
        save_small(tmp_path / "file" / "checkpoints", 1)


def test_what_dead_processes_left_is_cleared_and_what_living_ones_write_is_not(
    tmp_path,
):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f".tmp-{pid}" / "step").mkdir(parents=True)
    save_small(tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == {f".tmp-{os.getppid()}", "00000001"}


# One process imports, which takes seconds, and for every line it reads forks a child
# that saves until it is killed.
SAVER = """
    import itertools, os, pathlib, signal, sys, time
    import numpy as np
    from orbax.checkpoint import v1
    from trix_jax.lm.checkpoint import checkpoint

    def save_for_ever(directory):
        for step in itertools.count((checkpoint.newest_good(directory) or 0) + 1):
            for _ in range(2):
                checkpoint.save(directory, step, {"w": np.full(20_000, step)}, {"step": step})
                os.write(1, f"{step}\\n".encode())

    for seconds in map(float, iter(sys.stdin.readline, "")):
        child = os.fork()
        if not child:
            save_for_ever(pathlib.Path(sys.argv[1]))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.write(1, b"killed\\n")
"""


def kill_in_a_loop_of_saves(directory: Path, env: dict[str, str], kills: int) -> int:
    chance = random.Random(kills)
    saves = 0
    with run_python(SAVER, directory, env=env, stdin=-1, stdout=-1) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(kills):
            process.stdin.write(f"{chance.uniform(0.2, 0.9)}\n")
            process.stdin.flush()
            saved = [int(line) for line in iter(process.stdout.readline, "killed\n")]
            saves += len(saved)
            said = []
            newest = checkpoint.newest_good(directory, report=said.append) or 0
            assert said == []
            assert newest >= max(saved, default=0)
            for step in checkpoint.steps(directory):
                state, meta = checkpoint.restore(
                    directory, step, {"w": np.zeros(20_000, int)}
                )
                assert meta == {"step": step}
                assert (state["w"] == step).all()
    return saves


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_steps_only(tmp_path, user_env):
    assert kill_in_a_loop_of_saves(tmp_path, user_env, kills=8) > 8


@pytest.mark.slow
def test_a_hundred_kills_leave_whole_steps_only(tmp_path, user_env):
    assert kill_in_a_loop_of_saves(tmp_path, user_env, kills=100) > 100
