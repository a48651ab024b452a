"""The console script, as a user's shell sees it: exit codes, sentences, the JSON line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from trix_jax.cli import main
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.train import metrics

ROOT = Path(__file__).parents[2]
TINY = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 16 "
    "--model.num-tiles 4 --model.tiles-per-cluster 2 --train.batch-size 8 "
    "--train.eval-batch-size 64"
).split()
TRIX = [
    sys.executable,
    "-c",
    "import sys; from trix_jax.cli import main; sys.exit(main())",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "input.txt"
    path.write_text(
        "\n".join(f"{i} is {i * i % 61}, not {i * 7 % 53}" for i in range(400))
    )
    return path


def preset(directory):
    path = directory / "preset.yaml"
    path.write_text(
        "data: {source: text, tokenizer: char}\nmodel: {d_model: 16}\n"
        "arms: {dense: {model.ffn: dense, model.ffn_width: match-params}}\n"
    )
    return path


def trix(*args, env):
    command = [*TRIX, *map(str, args)]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize(
    "argv", [[], ["--help"], ["train", "--help"], ["demo", "--help"]]
)
def test_help_exits_zero(argv, capsys):
    assert main(argv) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_unknown_verb_exits_two_and_lists_verbs(capsys):
    assert main(["trian"]) == 2
    assert "'trian' is no verb" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model.num-tile", "8"], "--model.num-tiles"),
        (["--model.num-tiles", "many"], "num-tiles"),
        (["--model.num-tiles", "5"], "num_tiles=5 must divide"),
        (["--model.n-heads", "3"], "n_heads=3 must divide d_model=16"),
        (["--model.tiles-per-token", "9"], "tiles_per_token=9"),
        (["--train.steps", "0"], "steps must be at least 1"),
        (["--arm", "dens"], "arm must be one of dense, base"),
        (["--data.path", "/nowhere/x.txt"], "/nowhere/x.txt"),
        (["--model.vocab-size", "3"], "vocab_size=3 must be the tokenizer's"),
    ],
)
def test_train_user_mistake_exits_two_with_its_sentence(
    flags, sentence, text, tmp_path, capsys, no_type_hook
):
    argv = ["train", str(preset(tmp_path)), "--workdir", str(tmp_path / "run")]
    assert main([*argv, "--data.path", str(text), *flags]) == 2
    out = capsys.readouterr()
    assert sentence in " ".join((out.err + out.out).split())


def test_train_missing_preset_exits_two(capsys):
    assert main(["train", "nope.yaml", "--workdir", "x"]) == 2
    assert "nope.yaml cannot be read" in capsys.readouterr().err


def test_eval_without_a_run_exits_two(tmp_path, capsys):
    assert main(["eval", "--checkpoint", str(tmp_path)]) == 2
    assert "must be a run directory" in capsys.readouterr().err


def last_json(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def train_args(directory, text, *more):
    return [
        *("train", preset(directory), *TINY, "--workdir", directory / "run"),
        *("--data.path", text, *more),
    ]


def json_of(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.slow
def test_train_eval_generate_export_end_to_end(text, tmp_path, user_env, capsys):
    steps = ["--train.steps", 6, "--train.eval-every", 3, "--json"]
    summary = last_json(trix(*train_args(tmp_path, text, *steps), env=user_env))
    assert summary["steps"] == 6
    run, packed = tmp_path / "run", tmp_path / "packed"
    assert (run / "REPORT.md").exists()
    found = json_of(capsys, "eval", "--checkpoint", run)
    assert found["val_loss"] == pytest.approx(summary["final_val_loss"], rel=1e-6)
    assert found.keys() >= {"val_ppl", "val_bits_per_byte", "tokens", "step"}
    sizes = json_of(capsys, "export", "--checkpoint", run, "--output", packed)
    assert sizes["ratio"] > 8
    again = json_of(capsys, "eval", "--checkpoint", packed, "--data", run / "data")
    assert again["val_loss"] == found["val_loss"]
    assert again["step"] is None
    flags = ["--prompt", "1 is", "--tokens", 5, "--temperature", 0]
    texts = [
        json_of(capsys, "generate", "--checkpoint", where, *flags)["text"]
        for where in (run, packed)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("1 is")


def wait_for_step(run, step, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        path = run / "metrics.jsonl"
        if path.exists():
            lines = list(metrics.read(path))
            if lines and lines[-1]["step"] >= step:
                return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached in {seconds} seconds.")


@pytest.mark.slow
def test_train_killed_and_started_again_equals_the_uninterrupted_run(
    text, tmp_path, user_env
):
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    flags = ["--train.steps", 600, "--train.checkpoint-every", 100]
    flags += ["--train.eval-every", 300, "--train.rebuild-every", 70]
    done = trix(*train_args(tmp_path / "whole", text, *flags), env=user_env)
    assert done.returncode == 0, done.stderr
    command = [*TRIX, *map(str, train_args(tmp_path / "broken", text, *flags))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=user_env, cwd=ROOT, **pipes) as process:
        wait_for_step(tmp_path / "broken" / "run", 150, process)
        os.kill(process.pid, signal.SIGKILL)
    done = trix(*train_args(tmp_path / "broken", text, *flags), env=user_env)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "broken" / "run", 600)


@pytest.mark.slow
def test_train_sigterm_saves_and_exits_75_and_goes_on(text, tmp_path, user_env):
    flags = ["--train.steps", 200000, "--train.eval-every", 100000]
    command = [*TRIX, *map(str, train_args(tmp_path, text, *flags))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=user_env, cwd=ROOT, **pipes) as process:
        wait_for_step(tmp_path / "run", 20, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "stopped by SIGTERM after step" in errors
    (step,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert step >= 20


def assert_same_run(a, b, step):
    trees = [checkpoint.restore_arrays(run / "checkpoints", step) for run in (a, b)]
    for x, y in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(x, y)
    kept = []
    for run in (a, b):
        lines = list(metrics.read(run / "metrics.jsonl"))
        own = ("tokens_per_second", "memory_bytes")
        kept.append([{k: v for k, v in line.items() if k not in own} for line in lines])
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_doctor_passes_and_says_what_runs_where(capsys):
    assert main(["doctor", "--json"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert out["passed"]
    assert set(out["checks"]) >= {
        "SparseTriXFFN",
        "HierarchicalTriXFFN",
        "SparseLookupFFN",
    }


def test_doctor_says_why_blackwell_keeps_xla_for_grouped_products(monkeypatch, capsys):
    monkeypatch.setattr("trix_kernels.device.unsupported_reason", lambda: None)
    monkeypatch.setattr("trix_kernels.device.arch", lambda: "sm_100a")
    monkeypatch.setattr("trix_jax.cli.doctor._smoke", dict)  # tried in the slow test
    assert main(["doctor", "--json"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    (told,) = out["devices"].values()
    by_name = "Mosaic GPU kernels (sm_100a) where they are asked for"
    assert told.startswith(f"{by_name}, XLA for grouped products")
    assert "multiply by wgmma" in told
    assert len(out["choices"]) == 4
    assert all(": xla, not measured on a GPU" in line for line in out["choices"])
    monkeypatch.setattr("trix_kernels.device.arch", lambda: "sm_90a")
    assert main(["doctor", "--json"]) == 0
    out = json.loads(capsys.readouterr().out.splitlines()[-1])
    (told,) = out["devices"].values()
    assert told.startswith("Mosaic GPU kernels (sm_90a); XLA for the FFN in training. ")
    assert "not measured on a GPU yet; --model.implementation mosaic_gpu takes" in told


@pytest.mark.slow
@pytest.mark.parametrize(("more", "is_fine"), [("", True), ("x", False)])
def test_deterministic_sets_a_flag_that_xla_knows(user_env, more, is_fine):
    """XLA ends a process at its first computation if a flag is unknown to it."""
    script = (
        "import os; from trix_jax.cli.common import be_deterministic; be_deterministic()\n"
        f"os.environ['XLA_FLAGS'] = os.environ['XLA_FLAGS'].replace('ops', 'ops{more}')\n"
        "import jax; print(jax.numpy.ones(2) + 1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=user_env, capture_output=True, check=False
    )
    assert (done.returncode == 0) == is_fine


@pytest.mark.slow
def test_help_and_a_mistyped_verb_or_flag_need_no_jax(user_env):
    code = (
        "import sys; from trix_jax.cli.main import main; "
        "assert main(['--help']) == 0; assert main(['trian']) == 2; "
        "assert main(['train', '--train.lerning-rate', '1']) == 2; "
        "assert not {'jax', 'numpy', 'tyro'} & {*sys.modules}; import trix_jax; "
        "assert {'SparseTriXFFN', 'routing'} <= set(dir(trix_jax)); "
        "assert trix_jax.routing.update and trix_jax.nn.TriXLinear is trix_jax.TriXLinear"
    )
    subprocess.run([sys.executable, "-c", code], env=user_env, check=True)
