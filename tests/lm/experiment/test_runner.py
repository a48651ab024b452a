"""The runner: slots, restarts, interruption, and one real experiment end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from trix_jax.cli.experiment import read_experiment
from trix_jax.cli.main import main
from trix_jax.lm.experiment import runner
from trix_jax.lm.experiment.job_files import render
from trix_jax.lm.experiment.runner import Run, command, make_slots, progress, run_all

ROOT = Path(__file__).parents[3]
COMMITTED = sorted((ROOT / "experiments/scale").glob("*.yaml"))

# What a run does, as far as the runner sees it; the arm says how it behaves.
STUB = """
import json, os, pathlib, signal, sys, time
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))
arm, workdir = flags["--arm"], pathlib.Path(flags["--workdir"])
began = (workdir / "metrics.jsonl").exists()
(workdir / "cores").write_text(str(sorted(os.sched_getaffinity(0))))
(workdir / "metrics.jsonl").write_text(json.dumps({"event": "step", "step": 3, "loss": 2.5}) + "\\n")
print("a line of the log", flush=True)
if arm == "bad": sys.exit(2)
if arm == "dies": sys.exit(1)
if arm == "killed-once" and not began: os.kill(os.getpid(), signal.SIGKILL)
if arm == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
(workdir / "summary.json").write_text(json.dumps({"steps": 5}))
(workdir / "REPORT.md").write_text("")
"""


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(runner, "PROGRAM", STUB)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def planned(arm, seed=42):
    return Run("tiny", arm, seed, 5, ("--arm", arm), "data/tiny")


def states(runs, workdir, slots=2, retries=2):
    rows = run_all(runs, workdir, make_slots(slots), retries, lambda rows: None)
    return {row["arm"]: row for row in rows}


def test_run_all_restarts_what_was_killed_and_leaves_the_others(stub, tmp_path):
    arms = ("good", "killed-once", "dies", "bad")
    rows = states([planned(arm) for arm in arms], tmp_path)
    assert {arm: row["state"] for arm, row in rows.items()} == {
        "good": "done",
        "killed-once": "done",
        "dies": "failed",
        "bad": "failed",
    }
    restarts = {arm: row["restarts"] for arm, row in rows.items()}
    assert restarts == {"good": 0, "killed-once": 1, "dies": 2, "bad": 0}
    core = (tmp_path / "runs/tiny/good/seed-42/cores").read_text()
    assert core in ([str(sorted(slot.cores)) for slot in make_slots(2)])
    assert rows["dies"]["why"] == "exit code 1: a line of the log"
    assert "SIGKILL" in rows["killed-once"]["why"]


def test_run_all_does_not_repeat_what_is_done(stub, tmp_path):
    states([planned("good")], tmp_path)
    log = tmp_path / "runs/tiny/good/seed-42/log.txt"
    before = log.read_text()
    assert states([planned("good")], tmp_path)["good"]["state"] == "done"
    assert log.read_text() == before


@pytest.mark.slow
def test_run_all_uses_as_many_slots_as_there_are(stub, tmp_path):
    most = []

    def show(rows):
        most.append(sum(row["state"] == "running" for row in rows))

    runs = [planned("good", seed) for seed in range(5)]
    run_all(runs, tmp_path, make_slots(2), 0, show)
    assert max(most) == 2


def test_run_all_interrupted_lets_every_run_save(stub, tmp_path):
    shown = []

    def show(rows):
        shown.append([row["state"] for row in rows])
        logs = tmp_path.glob("runs/*/*/*/metrics.jsonl")
        if shown[-1] == ["running", "running"] and len(list(logs)) == 2:
            time.sleep(0.3)  # both have their handler by then
            os.kill(os.getpid(), signal.SIGTERM)

    runs = [planned("waits", seed) for seed in (1, 2)]
    with pytest.raises(runner.Interrupted, match="every run has saved"):
        run_all(runs, tmp_path, make_slots(2), 0, show)
    assert shown[-1] == ["stopped", "stopped"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_run_whose_runner_was_killed_saves(tmp_path):
    runner = f"""
import pathlib
from trix_jax.lm.experiment import runner as e
e.PROGRAM = {STUB!r}.replace("sys.exit(75)", "((workdir / 'saved').touch(), sys.exit(75))")
run = e.Run("tiny", "waits", 1, 5, ("--arm", "waits"), "data")
e.run_all([run], pathlib.Path({str(tmp_path)!r}), e.make_slots(1), 0, lambda rows: None)
"""
    process = subprocess.Popen([sys.executable, "-c", runner])
    directory = tmp_path / "runs/tiny/waits/seed-1"
    _wait_for(directory / "metrics.jsonl")
    time.sleep(0.5)  # it has its handler by then
    process.kill()
    process.wait()
    _wait_for(directory / "saved")


def _wait_for(path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def test_make_slots_gives_each_gpu_one_and_shares_when_asked(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert [slot.env for slot in make_slots()] == [
        {"CUDA_VISIBLE_DEVICES": "0"},
        {"CUDA_VISIBLE_DEVICES": "3"},
    ]
    shared = make_slots(4)
    assert [slot.name for slot in shared] == ["GPU 0", "GPU 3"] * 2
    assert shared[0].env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.45"


def test_make_slots_without_gpu_splits_the_cores(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert [sorted(slot.cores) for slot in make_slots(2)] == [[0, 2], [1, 3]]
    assert [sorted(slot.cores) for slot in make_slots(8)][4:] == [[0], [1], [2], [3]]


def test_progress_reads_the_end_of_a_line_being_written(tmp_path):
    lines = [json.dumps({"step": 4, "loss": 1.5}), '{"step": 5, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert progress(tmp_path)[:2] == (4, 1.5)
    assert progress(tmp_path / "nothing").step == 0


PRESET = """
data: {source: text, tokenizer: byte}
model: {ffn: lookup, context: 16, d_model: 16, n_layers: 1, n_heads: 2, num_tiles: 4, tiles_per_cluster: 2}
train: {steps: 6, batch_size: 2, eval_every: 3, warmup_steps: 1}
arms:
  lookup: {model.ffn: lookup}
  dense: {model.ffn: dense, model.ffn_width: match-params}
"""


@pytest.fixture
def small(tmp_path, corpus):
    (tmp_path / "preset.yaml").write_text(PRESET)
    tree = {
        "name": "small",
        "label": "A test.",
        "sizes": {"s": "preset.yaml"},
        "arms": ["lookup", "dense"],
        "seeds": [1, 2],
        "set": {"data.path": str(corpus)},
        "arm_set": {"dense": {"train.learning_rate": 2e-3}},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_read_experiment_makes_a_run_of_every_size_arm_and_seed(small, tmp_path):
    runs = read_experiment(str(small)).runs
    names = [p.run.name for p in runs]
    assert names == [f"s/{arm}/seed-{n}" for arm in ("lookup", "dense") for n in (1, 2)]
    assert {p.config.train.learning_rate for p in runs[2:]} == {2e-3}
    words = command(runs[0].run, tmp_path)
    assert words[0] == "train"
    assert words[-4:] == [
        "--data.path",
        str(tmp_path / "data/s"),
        "--workdir",
        str(tmp_path / "runs/s/lookup/seed-1"),
    ]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"arms": []}, "arms in .* must be a list with entries"),
        ({"sizes": {"s": "nowhere.yaml"}}, "config nowhere.yaml of .* is not there"),
        ({"arm_set": {"moe": {}}}, "arm_set in .* must name arms. Got 'moe'"),
        ({"colour": "red"}, "colour in .* must be one of"),
        (
            {"arms": ["moe"], "arm_set": {}},
            "arm must be one of dense, lookup, base",
        ),
    ],
)
def test_read_experiment_says_what_is_wrong(small, change, match):
    tree = yaml.safe_load(small.read_text()) | change
    small.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=match):
        read_experiment(str(small))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_experiment_reads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    read = read_experiment(str(path))
    assert read.name == path.stem
    tree = yaml.safe_load(path.read_text())
    count = len(tree["sizes"]) * len(tree["arms"]) * len(tree["seeds"])
    assert len({p.run.name for p in read.runs}) == count


@pytest.mark.parametrize("engine", ["slurm", "kubernetes", "skypilot"])
def test_render_hands_every_run_to_the_engine(small, engine, capsys, tmp_path):
    assert main(["experiment", str(small), "--render", engine, "--workdir", "/r"]) == 0
    text = capsys.readouterr().out
    for name in ("s/lookup/seed-1", "s/dense/seed-2"):
        assert name in text
    assert f"trix-jax experiment {small} --workdir /r --slots 1 --only" in text
    if engine == "slurm":
        assert "--array=0-3%4" in text
        (tmp_path / "job").write_text(text)
        subprocess.run(["bash", "-n", tmp_path / "job"], check=True)
        return
    tree = yaml.safe_load(text)
    script = tree["run"] if engine == "skypilot" else _args(tree)
    subprocess.run(["bash", "-n", "-c", script], check=True)


def _args(tree):
    (container,) = tree["spec"]["template"]["spec"]["containers"]
    return container["args"][0]


def test_render_gives_a_job_of_one_name_per_index():
    text = render("slurm", "E 1", ["a/b/seed-1"], "e.yaml", "/w", 1)
    assert "--job-name=e-1" in text
    assert "--array=0-0%1" in text


@pytest.mark.slow
def test_experiment_runs_reports_and_goes_on(small, user_env, tmp_path):
    tree = yaml.safe_load(small.read_text()) | {"seeds": [1]}
    small.write_text(yaml.safe_dump(tree))
    code = "import sys; from trix_jax.cli.main import main; sys.exit(main())"
    argv = [sys.executable, "-c", code, "experiment", str(small), "--json"]
    argv += ["--workdir", str(tmp_path / "e")]
    first = subprocess.run(
        argv, env=user_env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows = json.loads(first.stdout.splitlines()[-1])["runs"]
    assert {row["state"] for row in rows} == {"done"}
    text = (tmp_path / "e/REPORT.md").read_text()
    assert "Lower perplexity than a parameter-equivalent dense FFN" in text
    assert "> A test." in text
    assert str(tmp_path) not in text
    for name in ("costs", "s_loss", "s_steps", "s_lookup_usage", "s_lookup_routing"):
        assert (tmp_path / f"e/plots/{name}.png").stat().st_size > 5000
        assert f"plots/{name}.png" in text
    results = json.loads((tmp_path / "e/metrics.json").read_text())
    assert len(results) == 2
    keys = (
        "setting arm seed learning_rate steps tokens val_loss params_total ffn_active "
        "ffn_bits min_entropy_share dead_tiles seconds command git_commit"
    )
    assert all(set(keys.split()) <= set(result) for result in results)
    again = subprocess.run(
        argv, env=user_env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "2 runs, 2 of them done" in again.stderr
