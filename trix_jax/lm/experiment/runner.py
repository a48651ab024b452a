"""Runs of an experiment, side by side: a process each, in a slot each.

A slot is a GPU, a share of one, or a CPU core. A run whose process dies starts again
from its checkpoint, `retries` times; the others go on. A run that is done is not run
again. What a run does is `trix-jax train`; clusters get the same runs by a job file
(`trix_jax.lm.experiment.job_files`), and there is no other scheduler here.

```
DIR/experiment.json   the plan: every run with its flags
DIR/data/SIZE/        the token store of a size
DIR/runs/SIZE/ARM/seed-N/     a run directory each, with log.txt
```
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trix_jax.lm.signals import Interrupted, Signals

PLAN = "experiment.json"
POLL_SECONDS = 0.5
TAIL_BYTES = 65_536
BAD_INPUT, INTERRUPTED = 2, 75
PROGRAM = "import sys; from trix_jax.cli.main import main; sys.exit(main())"

State = Literal["waiting", "running", "done", "failed", "stopped"]


class Run(NamedTuple):
    """A planned run.

    Attributes:
        flags: of `trix-jax train`, without data and workdir.
        store: where its tokens are, relative to the experiment's directory, or
            absolute.
    """

    size: str
    arm: str
    seed: int
    steps: int
    flags: tuple[str, ...]
    store: str

    @property
    def name(self) -> str:
        return f"{self.size}/{self.arm}/seed-{self.seed}"

    def directory(self, workdir: Path) -> Path:
        return workdir / "runs" / self.name


class Slot(NamedTuple):
    """Where a process runs: environment to add, and cores to stay on."""

    name: str
    env: dict[str, str]
    cores: frozenset[int]


class Progress(NamedTuple):
    """How far a run is, from the end of its metrics."""

    step: int = 0
    loss: float | None = None
    val_loss: float | None = None
    tokens_per_second: float | None = None


class _Status:
    """A run while the experiment goes on."""

    def __init__(self, run: Run, workdir: Path):
        self.run, self.directory = run, run.directory(workdir)
        self.state: State = "done" if is_done(run, workdir) else "waiting"
        self.restarts = 0
        self.process: subprocess.Popen | None = None
        self.slot: Slot | None = None
        self.why = ""


def make_slots(count: int | None = None) -> list[Slot]:
    """The slots of this machine: one a GPU, or one a core.

    Args:
        count: other than one a device: several share a GPU's memory, or fewer share
            the cores.
    """
    gpus = _gpus()
    if gpus:
        count = count or len(gpus)
        each = -(-count // len(gpus))
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / each:.2f}"}
        return [
            Slot(
                f"GPU {gpus[i % len(gpus)]}",
                {"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}
                | (share if each > 1 else {}),
                frozenset(),
            )
            for i in range(count)
        ]
    cores = _cores()
    count = count or len(cores)
    groups = [frozenset(cores[i % len(cores) :: count]) for i in range(count)]
    return [Slot(f"core {min(group)}", {}, group) for group in groups]


def run_all(
    runs: Sequence[Run],
    workdir: Path,
    slots: Sequence[Slot],
    retries: int,
    show: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Runs what is not done; returns a row for every run.

    Args:
        show: takes the rows twice a second.

    Raises:
        Interrupted: SIGTERM or SIGINT, after every run has saved.
    """
    statuses = [_Status(run, workdir) for run in runs]
    free = list(slots)
    with Signals() as signals:
        while any(s.state in ("waiting", "running") for s in statuses):
            if signals.caught:
                _stop(statuses)
                show([_row(s) for s in statuses])
                raise Interrupted(
                    f"stopped by {signals.caught}; every run has saved. The same command goes on."
                )
            for status in statuses:
                if status.state == "running":
                    _reap(status, free, retries)
                if status.state == "waiting" and free:
                    _start(status, free.pop(0), workdir)
            show([_row(s) for s in statuses])
            time.sleep(POLL_SECONDS)
    rows = [_row(s) for s in statuses]
    show(rows)
    return rows


def command(run: Run, workdir: Path) -> list[str]:
    """The arguments of `trix-jax` that make a run."""
    store = Path(run.store)
    store = store if store.is_absolute() else workdir / store
    where = ["--data.path", str(store), "--workdir", str(run.directory(workdir))]
    return ["train", *run.flags, *where]


def is_done(run: Run, workdir: Path) -> bool:
    """Whether a run has come to its end, its report included."""
    directory = run.directory(workdir)
    try:
        summary = json.loads((directory / "summary.json").read_bytes())
    except (OSError, ValueError):
        return False
    return summary["steps"] == run.steps and (directory / "REPORT.md").is_file()


def progress(directory: Path) -> Progress:
    """Reads the end of `metrics.jsonl`."""
    found: dict[str, Any] = {}
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().splitlines()[1 if size > TAIL_BYTES else 0 :]
    except OSError:
        return Progress()
    for line in lines:
        try:
            found |= json.loads(line)
        except ValueError:
            continue  # being written
    names = ("loss", "val_loss", "tokens_per_second")
    return Progress(found.get("step", 0), *(found.get(name) for name in names))


def _start(status: _Status, slot: Slot, workdir: Path) -> None:
    status.directory.mkdir(parents=True, exist_ok=True)
    with (status.directory / "log.txt").open("a") as log:
        status.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                _prelude(slot) + PROGRAM,
                *command(status.run, workdir),
            ],
            env=os.environ | slot.env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches us, and we ask each to save once
        )
    status.state, status.slot = "running", slot


def _prelude(slot: Slot) -> str:
    """What a process does before all else: stay on its cores, and save when we are
    killed. Not a `preexec_fn`, which is not safe where there are threads.
    """
    lines = []
    if slot.cores and hasattr(os, "sched_setaffinity"):
        lines.append(f"import os; os.sched_setaffinity(0, {sorted(slot.cores)})")
    if sys.platform == "linux":  # PR_SET_PDEATHSIG is 1
        call = f"ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})"
        lines.append(f"import ctypes; {call}")
    return "".join(f"{line}\n" for line in lines)


def _reap(status: _Status, free: list[Slot], retries: int) -> None:
    assert status.process is not None
    assert status.slot is not None
    code = status.process.poll()
    if code is None:
        return
    free.append(status.slot)
    status.slot = None
    if code == 0:
        status.state = "done"
    elif code == BAD_INPUT or status.restarts >= retries:
        status.state, status.why = "failed", _why(code, status.directory)
    else:
        status.restarts += code != INTERRUPTED  # who saved and stopped may go on
        status.state, status.why = "waiting", _why(code, status.directory)


def _stop(statuses: Iterable[_Status]) -> None:
    running = [s for s in statuses if s.state == "running"]
    processes = [s.process for s in running if s.process]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for status, process in zip(running, processes, strict=True):
        status.state = "done" if process.wait() == 0 else "stopped"


def _why(code: int, directory: Path) -> str:
    """Exit code, or signal, and the last line of the log."""
    ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    lines = (directory / "log.txt").read_text(errors="replace").strip().splitlines()
    return f"{ended}: {lines[-1][:200]}" if lines else ended


def _row(status: _Status) -> dict[str, Any]:
    run = status.run
    return {
        "size": run.size,
        "arm": run.arm,
        "seed": run.seed,
        "state": status.state,
        "steps": run.steps,
        "restarts": status.restarts,
        "slot": status.slot.name if status.slot else "",
        "why": status.why,
        **progress(status.directory)._asdict(),
    }


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that a process of ours may use, without loading CUDA."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip()]
    found = (re.fullmatch(r"nvidia(\d+)", p.name) for p in Path("/dev").glob("nvidia*"))
    return sorted((match[1] for match in found if match), key=int)
