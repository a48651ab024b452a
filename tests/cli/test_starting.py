"""What starts a verb quickly: its flags as a table, and compilations that are kept."""

import json
import os
import subprocess
import sys
import time

import pytest

from trix_jax.cli import compilations, flags
from trix_jax.cli.main import _keep_compilations
from trix_jax.lm.train import metrics

TRIX = [sys.executable, "-c", "from trix_jax.cli import main; exit(main())"]
SMALL = (
    "--model.ffn sparse --model.context 16 --model.d-model 16 --model.n-layers 1 "
    "--model.n-heads 2 --model.num-tiles 4 --data.tokenizer char --train.steps 4 "
    "--train.eval-every 2"
).split()
KEPT, OFF = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"


def test_the_table_of_flags_is_that_of_the_parsers():
    kept = json.loads(flags.FILE.read_text("utf-8"))
    assert flags.collect() == kept, flags.__doc__


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--train.lerning-rate", "1"], "Did you mean --train.learning-rate or"),
        (["--model.num-tile=8"], "--model.num-tile is no flag of this verb. Did you"),
        (["x.yaml", "--zzzzzz"], "--zzzzzz is no flag of this verb. `trix-jax train"),
        (["x.yaml", "--model.num_tiles=8", "--other_data", "--seed", "-1"], None),
        (["--no-compilation-cache", "--no-json", "-h", "--help"], None),
        (["--no_compilation_cache", "---", "-- a b", "--workdir", "--"], None),
        (["--", "--zzzzzz"], None),
    ],
)
def test_a_flag_that_no_verb_has_is_named_with_the_nearest(argv, sentence):
    said = flags.mistake("train", argv)
    assert said is None if sentence is None else sentence in said


@pytest.fixture
def before_jax(monkeypatch, tmp_path):
    """A process that has not imported JAX, and the folder of its user's caches."""
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_compilations_are_kept_for_their_user_alone(before_jax):
    environment, said = {}, []
    folder = compilations.keep(environment, said.append)
    assert folder == before_jax / "trix_jax" / "compilations"
    assert environment[KEPT] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert said == []
    for path in (folder, folder.parent):
        path.chmod(0o770)
        environment, said = {}, []
        assert compilations.keep(environment, said.append) is None
        assert environment == {}
        (line,) = said
        assert f"{path} must be yours alone" in line
        path.chmod(0o700)


def test_what_a_killed_process_left_half_written_goes(before_jax):
    folder = compilations.keep({}, pytest.fail)
    for name, age in (("whole", 100), ("stump", 100), ("being-written", 1)):
        (folder / f"{name}-cache").write_bytes(b"...")
        os.utime(folder / f"{name}-cache", (time.time() - age,) * 2)
    (folder / "whole-atime").write_bytes(b"")
    assert compilations.keep({}, pytest.fail) == folder
    left = {path.name for path in folder.iterdir()}
    assert left == {"whole-cache", "whole-atime", "being-written-cache"}


@pytest.mark.parametrize(
    ("argv", "rest", "kept"),
    [
        (["a", "--no-compilation-cache"], ["a"], {OFF: "false"}),
        (["--no_compilation_cache", "a"], ["a"], {OFF: "false"}),
        (["--distributed", "a"], ["--distributed", "a"], {}),
    ],
)
def test_a_flag_holds_for_the_processes_that_a_verb_starts(
    before_jax, monkeypatch, argv, rest, kept
):
    """They inherit the environment."""
    environment = {}
    monkeypatch.setattr(os, "environ", environment)
    assert _keep_compilations("train", argv) == rest
    assert environment == kept
    assert not (before_jax / "trix_jax").exists()
    environment[KEPT] = "/elsewhere"
    compilations.keep_nothing(environment)
    assert environment == {KEPT: "/elsewhere", **kept}


@pytest.mark.parametrize(
    "chosen", [{KEPT: "/elsewhere"}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}]
)
def test_what_the_user_set_for_jax_stays(before_jax, chosen):
    environment = dict(chosen)
    assert compilations.keep(environment, print) is None
    assert environment == chosen
    assert list(before_jax.iterdir()) == []


def test_a_process_that_has_jax_is_left_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment = {}
    assert compilations.keep(environment, print) is None
    assert environment == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_kept_compilation_gives_the_bits_of_a_new_one(corpus, user_env, tmp_path):
    """Compiled as for a user. And none is in a run directory, or kept where a flag says
    no.
    """
    folder = tmp_path / "cache" / "trix_jax" / "compilations"
    env = {k: v for k, v in user_env.items() if "CACHE" not in k and k != "XLA_FLAGS"}
    env["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # or chance decides

    def losses(name, *more):
        flags = ["--data.path", str(corpus), "--workdir", str(tmp_path / name)]
        command = [*TRIX, "train", *flags, *SMALL, *more]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = metrics.read(tmp_path / name / "metrics.jsonl")
        return [
            {k: v for k, v in line.items() if k in ("step", "loss", "val_loss")}
            for line in lines
        ]

    new = losses("off", "--no-compilation-cache")
    assert not folder.exists()
    assert losses("miss") == new
    entries, used = read(folder, "*-cache"), read(folder, "*-atime")
    assert entries
    assert losses("hit") == new
    assert read(folder, "*-cache").keys() == entries.keys()
    again = read(folder, "*-atime")
    assert all(again[name] != used[name] for name in used)
    assert all(folder in path.parents for path in tmp_path.glob("**/*-cache"))


def read(folder, pattern):
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}
