"""Where and how people start runs: under nohup, into a pipe that closes, without git,
twice in one directory, with no home or one that cannot be written.
"""

import errno
import hashlib
import io
import json
import os
import pwd
import signal
import subprocess
import sys
import urllib.request

import pytest

from trix_jax import files
from trix_jax.cli import compilations
from trix_jax.cli.main import main
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import RunConfig
from trix_jax.lm.data import download, iter_documents
from trix_jax.lm.data.datasets import DATASETS
from trix_jax.lm.experiment import budget
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


def test_of_two_runs_in_a_new_directory_the_second_changes_nothing(
    tiny_config, one_device, tmp_path
):
    new = tmp_path / "runs" / "new"
    with held(new, print):
        with pytest.raises(RuntimeError, match="another process trains in"):
            train(tiny_config, new, devices=one_device, report=lambda _: None)
        assert [path.name for path in new.iterdir()] == [".lock"]
    assert not new.exists()  # nothing was written in it


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


@pytest.fixture(params=["no account", "read-only", "a file"])
def no_cache(request, monkeypatch, tmp_path):
    """A place where no cache can be, and what is said of it."""
    if request.param == "no account":

        def unknown(uid):
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        yield "there is no home folder"
        return
    home = tmp_path / "home"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(home))
    if request.param == "a file":
        home.write_text("not a folder")
        yield "Not a directory"
        return
    home.mkdir(mode=0o555)
    try:
        (home / "probe").mkdir()
        pytest.skip("permissions bind nobody here, as they bind no root")
    except PermissionError:
        yield "Permission denied"
    finally:
        home.chmod(0o755)


def test_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert files.cache_folder() == tmp_path / ".cache" / "trix_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert files.cache_folder() == tmp_path / "other" / "trix_jax"


def test_download_that_cannot_be_kept_is_read_and_said(no_cache, monkeypatch, tmp_path):
    served, said = b"a stand-in with its own hash", []
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(served))
    sha256 = hashlib.sha256(served).hexdigest()
    monkeypatch.setattr("trix_jax.lm.data.sources.SHAKESPEARE_SHA256", sha256)
    found = list(iter_documents("shakespeare", None, report=said.append))
    assert found == [served.decode()]
    (line,) = said
    assert line.startswith("TinyShakespeare is not kept for the next time: ")
    assert no_cache in line


def test_data_set_that_has_no_place_says_what_to_set(no_cache):
    """Before anything is asked of the hub."""
    with pytest.raises(OSError, match=rf"{no_cache}.*: set XDG_CACHE_HOME to a folder"):
        download.fetch(DATASETS["fineweb_5m"], lambda _: None)


def test_compilations_that_cannot_be_kept_are_said_and_stop_nothing(
    no_cache, monkeypatch
):
    monkeypatch.delitem(sys.modules, "jax")
    environment, said = {}, []
    assert compilations.keep(environment, said.append) is None
    assert environment == {}
    (line,) = said
    assert line.startswith("compilations are not kept for the next time: ")
    assert no_cache in line


def test_compilation_that_cannot_be_kept_is_said_and_counted(no_cache, monkeypatch):
    said, done = [], {"peak_bytes": 7}
    steps = budget.train_steps
    monkeypatch.setattr(steps, "compiler", lambda: "python")
    monkeypatch.setattr(steps, "compile_case", lambda *_: done)
    models = {("s", "a"): RunConfig()}
    _, (row,) = budget.estimate(models, {("s", "a"): 1}, 1.0, "command", said.append)
    assert row["peak_bytes"] == 7
    told = [line for line in said if line.startswith("the compilation is not kept")]
    assert len(told) == 1
    assert no_cache in told[0]
