"""A run's metrics sent to TensorBoard or Weights & Biases, while it trains or
afterwards.

`metrics.jsonl` is the record and the training loop knows no other; a tracker reads it.
So a tracker can be started late, can fail without harm to the run, and a run that
resumes goes on in it: lines behind what was sent last are passed over.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from trix_jax.lm.config import read_yaml
from trix_jax.lm.train import metrics

Kind = Literal["tensorboard", "wandb"]


@runtime_checkable
class Tracker(Protocol):
    """Where scalars go."""

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Takes the scalars of a line."""

    def close(self) -> None:
        """Ends it."""


class TensorBoard:
    """Event files in `WORKDIR/tensorboard`; the `tensorboard` extra."""

    def __init__(self, workdir: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run named after the directory; the `wandb` extra, set up by its own environment
    variables.
    """

    def __init__(self, workdir: Path):
        import wandb

        config = read_yaml(workdir / "config.yaml")
        self._run = wandb.init(dir=workdir, name=workdir.resolve().name, config=config)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}


def track(
    workdir: str | Path, kind: Kind, *, follow: bool = False, seconds: float = 5.0
) -> int:
    """Sends a run's metrics to a tracker.

    Args:
        workdir: a run directory.
        kind: "tensorboard" or "wandb".
        follow: wait for more until the run's `summary.json` is there.
        seconds: between looks at the file.

    Returns:
        Lines sent.

    Raises:
        ValueError: no run there, or no such tracker.
    """
    workdir = Path(workdir)
    if kind not in TRACKERS:
        raise ValueError(
            f"kind must be one of {', '.join(get_args(Kind))}. Got {kind!r}."
        )
    if not (workdir / "config.yaml").is_file():
        raise ValueError(
            f"{workdir} must be a run directory, with a config.yaml. There is none."
        )
    tracker = TRACKERS[kind](workdir)
    try:
        return send(lines(workdir, follow, seconds), tracker)
    finally:
        tracker.close()


def send(found: Iterator[dict[str, Any]], tracker: Tracker) -> int:
    """Logs lines; one whose event was logged at this step or a later one is passed
    over. Returns how many were sent.
    """
    last: dict[str, int] = {}
    count = 0
    for line in found:
        if line["step"] > last.get(line["event"], -1):
            last[line["event"]] = line["step"]
            tracker.log(line["step"], scalars(line))
            count += 1
    return count


def lines(workdir: Path, follow: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`, again and again if it is followed, until the run is
    done.
    """
    path = workdir / "metrics.jsonl"
    while True:
        is_done = (workdir / "summary.json").is_file() or not follow
        if path.is_file():
            yield from metrics.read(path)
        if is_done:
            return
        time.sleep(seconds)


def scalars(line: dict[str, Any]) -> dict[str, float]:
    """`step/loss`, `step/routing_entropy/0`, `eval/tile_usage/0/3`: every number by its
    path.
    """
    found: dict[str, float] = {}

    def walk(name, value):
        if isinstance(value, list):
            for i, item in enumerate(value):
                walk(f"{name}/{i}", item)
        elif isinstance(value, int | float):
            found[name] = float(value)

    for key, value in line.items():
        if key not in ("event", "step"):
            walk(f"{line['event']}/{key}", value)
    return found
