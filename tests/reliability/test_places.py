"""Where and how people start runs: under nohup, into a pipe that closes, without git,
twice in one directory.
"""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from trix_jax import files
from trix_jax.cli.main import main
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.signals import Signals
from trix_jax.lm.train import metrics
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.run import held

TRIX = [sys.executable, "-c", "from trix_jax.cli.main import main; exit(main())"]
SMALL = (
    "--model.ffn sparse --model.context 16 --model.d-model 16 --model.n-layers 1 "
    "--model.n-heads 2 --model.num-tiles 4 --data.tokenizer char"
).split()


def test_verb_with_a_typing_error_is_suggested(capsys):
    assert main(["trian"]) == 2
    assert "'trian' is no verb. Did you mean train?" in capsys.readouterr().err


def test_signal_that_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and & leave it
    try:
        with Signals() as signals:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.caught == ""
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_run_whose_reader_goes_saves_and_ends_as_unix_tools_do(
    corpus, user_env, tmp_path
):
    run = tmp_path / "run"
    flags = ["--data.path", str(corpus), "--workdir", str(run), *SMALL]
    flags += ["--train.steps", "100000", "--train.eval-every", "20"]
    process = subprocess.Popen(
        [*TRIX, "train", *flags],
        env=user_env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step "):
        pass
    process.stdout.close()  # as `| head` does
    _, said = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGPIPE, said
    assert "Traceback" not in said
    (newest, *_) = sorted(checkpoint.steps(run / "checkpoints"), reverse=True)
    assert checkpoint.verify(run / "checkpoints" / f"{newest:08d}") is None
    lines = list(metrics.read(run / "metrics.jsonl"))
    assert lines[-1]["step"] == newest


@pytest.mark.slow
def test_closed_standard_output_takes_no_file_s_place(run_dir, user_env, tmp_path):
    command = 'exec "$@" >&-'
    verb = [*TRIX, "export", "--checkpoint", run_dir, "--output", tmp_path / "out"]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *map(str, verb)],
        env=user_env,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model"]["num_tiles"] == 4


def test_second_process_in_a_run_directory_is_refused_and_a_dead_one_holds_nothing(
    tiny_config, one_device, run_dir, tmp_path
):
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"
    )
    with held(run_dir, print):
        pass
    lock = str(run_dir / ".lock")
    other = subprocess.Popen(
        [sys.executable, "-c", code, lock], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="another process trains in"):
            train(tiny_config, run_dir, devices=one_device, report=lambda _: None)
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with held(run_dir, print):
        assert (run_dir / ".lock").exists()


def test_file_system_that_cannot_sync_folders_is_taken(monkeypatch, tmp_path):
    sync = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_whole(tmp_path / "a.txt", "whole")
    assert (tmp_path / "a.txt").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_without_git_there_is_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert metrics.git_commit() is None


def test_prompt_that_is_no_text_is_refused(run_dir, capsys):
    argv = ["generate", "--checkpoint", str(run_dir), "--prompt", "the \udcff"]
    assert main(argv) == 2
    assert r"prompt must be text in UTF-8. Got '\udcff' at 4" in capsys.readouterr().err


def test_what_a_dead_process_left_beside_a_file_goes_with_the_next_write(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".a.txt.{dead.pid}.tmp").write_text("half")
    (tmp_path / f".a.txt.{os.getppid()}.tmp").write_text("under way")
    files.write_whole(tmp_path / "a.txt", "whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"a.txt", f".a.txt.{os.getppid()}.tmp"}
