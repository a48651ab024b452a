"""The runner: slots, restarts, interruption, workers, and one real experiment."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from trix_jax.lm.experiment import results, runner
from trix_jax.lm.experiment.directory import claim, is_diverged, progress
from trix_jax.lm.experiment.live import Table
from trix_jax.lm.experiment.runner import grid, run_all
from trix_jax.lm.experiment.slots import make_slots
from trix_jax.lm.experiment.spec import Spec

# What a run does, as far as the runner sees it; the arm says how it behaves.
STUB = """
import json, os, pathlib, signal, sys, time
program, argv = ("MODULE", sys.argv[1]), sys.argv[sys.argv.index("train") + 1 :]
flags = dict(zip(argv[::2], argv[1::2]))
arm, workdir = flags["--arm"], pathlib.Path(flags["--workdir"])
began = (workdir / "metrics.jsonl").exists()
(workdir / "cores").write_text(str(sorted(os.sched_getaffinity(0))))
(workdir / "program").write_text(" ".join(program))
(workdir / "metrics.jsonl").write_text(json.dumps({"event": "step", "step": 3, "loss": 2.5}) + "\\n")
print("a line of the log", flush=True)
if arm == "bad": sys.exit(2)
if arm == "dies": sys.exit(1)
if arm == "diverges": sys.exit(print("validation loss (nan) is not finite: stopped") or 1)
if arm == "killed-once" and not began: os.kill(os.getpid(), signal.SIGKILL)
if arm == "saves-once" and not began: sys.exit(75)
if arm == "waits":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
"""


def stub_result(spec, folder):
    loss = None if is_diverged(folder / spec.name) else 2.5
    known = spec._asdict() | {"learning_rate": spec.rate, "val_loss": loss}
    return results.from_tree(known)


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(runner, "PROGRAM", STUB)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(results, "result_of", stub_result)


def asked(arm, seed=42, **more):
    return Spec("e", "tiny", arm, seed, 5, ("--arm", arm), "data/tiny", **more)


def rows_of(schedule, workdir, slots=2, retries=2, show=lambda rows: None, **more):
    where = (workdir / "runs", workdir / "metrics.json", make_slots(slots))
    return run_all(schedule, *where, retries, show, **more)


def states(rows, key="arm"):
    return {row[key]: row["state"] for row in rows}


def test_run_all_restarts_what_was_killed_and_leaves_the_others(stub, tmp_path):
    arms = ("good", "killed-once", "dies", "bad", "diverges")
    rows = rows_of(grid([asked(arm) for arm in arms]), tmp_path)
    assert states(rows) == {
        "good": "done",
        "killed-once": "done",
        "dies": "failed",
        "bad": "failed",
        "diverges": "diverged",
    }
    by_arm = {row["arm"]: row for row in rows}
    restarts = {arm: row["restarts"] for arm, row in by_arm.items()}
    assert restarts == {"good": 0, "killed-once": 1, "dies": 2, "bad": 0, "diverges": 0}
    core = (tmp_path / "runs/tiny/good/seed-42/cores").read_text()
    assert core in ([str(sorted(slot.cores)) for slot in make_slots(2)])
    assert by_arm["dies"]["why"] == "exit code 1: a line of the log"
    assert "SIGKILL" in by_arm["killed-once"]["why"]
    kept = {r.arm: r.is_finite for r in results.read(tmp_path / "metrics.json")}
    assert kept == {"good": True, "killed-once": True, "diverges": False}


def test_run_that_saved_and_stopped_goes_on_whatever_the_retries(stub, tmp_path):
    rows = rows_of(grid([asked("saves-once"), asked("dies")]), tmp_path, retries=0)
    assert states(rows) == {"saves-once": "done", "dies": "failed"}


def test_run_all_does_not_repeat_what_is_done(stub, tmp_path):
    schedule = grid([asked("good"), asked("diverges")])
    rows_of(schedule, tmp_path)
    log = tmp_path / "runs/tiny/good/seed-42/log.txt"
    before = log.read_text()
    rows = rows_of(schedule, tmp_path)
    assert states(rows) == {"good": "done", "diverges": "diverged"}
    assert log.read_text() == before


def test_run_all_asks_the_schedule_again_with_what_has_been_found(stub, tmp_path):
    def schedule(done):
        rates = {result.learning_rate for result in done}
        rate = next(r for r in (1e-3, 2e-3, 4e-3, 8e-3) if r not in rates)
        return [] if len(rates) == 3 else [asked("good", rate=rate)._replace(size="")]

    rows = rows_of(schedule, tmp_path)
    assert [row["name"] for row in rows] == [
        f"e/good-lr{rate:g}-seed42" for rate in (1e-3, 2e-3, 4e-3)
    ]


def test_run_all_starts_nothing_once_the_time_is_up(stub, tmp_path):
    assert states(rows_of(grid([asked("good")]), tmp_path, hours=0.0)) == {
        "good": "waiting"
    }


def test_patched_run_is_made_by_the_module_of_its_patch(stub, tmp_path):
    runs = [asked("good", 1), asked("good", 2, patch=("some.module", "wings"))]
    rows_of(grid(runs), tmp_path)
    folder = tmp_path / "runs/tiny/good"
    assert (folder / "seed-1/program").read_text() == "trix_jax.cli.main train"
    assert (folder / "seed-2/program").read_text() == "some.module wings"


def test_workers_side_by_side_never_make_the_same_run(stub, tmp_path):
    runs = [asked("good", seed) for seed in range(2)]
    hold = claim(tmp_path / "runs" / runs[0].name)
    assert claim(tmp_path / "runs" / runs[0].name) is None
    rows = rows_of(grid(runs), tmp_path)
    assert states(rows, "seed") == {0: "waiting", 1: "done"}
    assert rows[0]["why"] == "another worker is at it"
    # Who held it has finished it, after the schedule was asked.
    folder = tmp_path / "runs"
    results.add(tmp_path / "metrics.json", stub_result(runs[0], folder), folder)
    hold.close()
    assert states(rows_of(grid(runs), tmp_path), "seed") == {0: "done", 1: "done"}
    assert not (tmp_path / "runs" / runs[0].name / "log.txt").exists()


@pytest.mark.slow
def test_run_all_uses_as_many_slots_as_there_are(stub, tmp_path):
    most = []

    def show(rows):
        most.append(sum(row["state"] == "running" for row in rows))

    rows_of(grid([asked("good", seed) for seed in range(5)]), tmp_path, show=show)
    assert max(most) == 2


def test_run_all_interrupted_lets_every_run_save(stub, tmp_path):
    shown = []

    def show(rows):
        shown.append([row["state"] for row in rows])
        logs = tmp_path.glob("runs/*/*/*/metrics.jsonl")
        if shown[-1] == ["running", "running"] and len(list(logs)) == 2:
            time.sleep(0.3)  # both have their handler by then
            os.kill(os.getpid(), signal.SIGTERM)

    runs = [asked("waits", seed) for seed in (1, 2)]
    with pytest.raises(runner.Interrupted, match="every run has saved"):
        rows_of(grid(runs), tmp_path, show=show)
    assert shown[-1] == ["stopped", "stopped"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel")
def test_run_whose_runner_was_killed_saves_and_is_locked_until_then(tmp_path):
    saving = "((workdir / 'saving').touch(), time.sleep(2), (workdir / 'saved').touch(), sys.exit(75))"
    code = f"""
import pathlib
from trix_jax.lm.experiment import runner
from trix_jax.lm.experiment.slots import make_slots
from trix_jax.lm.experiment.spec import Spec
runner.PROGRAM = {STUB!r}.replace("sys.exit(75)", {saving!r})
spec = Spec("e", "tiny", "waits", 1, 5, ("--arm", "waits"), "data")
folder = pathlib.Path({str(tmp_path)!r})
runner.run_all(runner.grid([spec]), folder, folder / "r.json", make_slots(1), 0, lambda rows: None)
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    directory = tmp_path / "tiny/waits/seed-1"
    _wait_for(directory / "metrics.jsonl")
    time.sleep(0.5)  # it has its handler by then
    process.kill()
    process.wait()
    _wait_for(directory / "saving")
    assert claim(directory) is None
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
    for hidden, names in (
        ("-1", []),
        ("", []),
        ("2,-1,3", ["GPU 2"]),
    ):  # CUDA's own rule
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        found = [slot.name for slot in make_slots() if slot.name.startswith("GPU")]
        assert found == names


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


def test_table_says_each_change_of_a_run_once(stub, tmp_path):
    with (tmp_path / "out").open("w") as out, Table(out) as table:
        rows_of(grid([asked("diverges")]), tmp_path, show=table.show)
    lines = (tmp_path / "out").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["running", "diverged"]
    assert lines[-1].startswith("tiny/diverges/seed-42  diverged  step 3/5  loss 2.5")


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
    assert len(results.read(tmp_path / "e/metrics.json")) == 2
    again = subprocess.run(
        argv, env=user_env, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "2 runs, 2 of them done" in again.stderr
