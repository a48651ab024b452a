"""A run directory: what opens it, what goes on with it, what is kept of it.

`config.yaml` (resolved), `tokenizer.json`, `env.json`, `metrics.jsonl`, `summary.json`,
`checkpoints/`, and `data/` where the run prepared its own.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jax
import optax
import yaml

from trix_jax.files import read_json, write_json, write_whole, writing
from trix_jax.lm import config as run_config
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import RunConfig, to_tree
from trix_jax.lm.data import Store, is_store, made_with, open_store, prepare
from trix_jax.lm.train import extend, metrics, provenance
from trix_jax.lm.train.parallel import Mapping
from trix_jax.nn.transformer import TransformerLM

Resume = Literal["auto", "never", "must"]
Report = Callable[[str], None]


class Run(NamedTuple):
    """What stays the same from the first step to the last.

    Attributes:
        init_from: where its first weights came from (`initial.read_record`); None: drawn.
        data_since: the step after which the present data came; 0 without other data. Its
            windows and epochs are counted from there.
    """

    config: RunConfig
    workdir: Path
    store: Store
    model: TransformerLM
    optimizer: optax.GradientTransformation
    devices: list[jax.Device]
    mapping: Mapping
    init_from: dict[str, Any] | None = None
    data_since: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.workdir / "checkpoints"

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.model.context


def open_data(
    config: RunConfig,
    workdir: Path,
    report: Report = print,
    is_new: bool = True,
    other_data: bool = False,
) -> Store:
    """The run's token store: the one at `data.path`, or `workdir/data`, prepared on
    first use.

    Text that changed since stops a new run; one that goes on has its tokens, and is
    told.

    Args:
        other_data: a run that goes on wants other data than its own.

    Raises:
        ValueError: the text is other than the store in `workdir` was made from.
    """
    if config.data.path and is_store(config.data.path):
        return open_store(config.data.path)
    own, context = workdir / "data", config.model.context
    if is_new or not (other_data and is_store(own)):
        changed = "refuse" if is_new else "tell"
        return prepare(config.data, own, report, context, changed)
    try:
        return prepare(config.data, own, report, context)
    except ValueError as error:
        raise ValueError(
            f"{error} Other data must be a store of its own: trix-jax prepare --workdir "
            f"STORE --data.path TEXT --data.tokenizer {workdir / 'tokenizer.json'}, then "
            "--data.path STORE --other-data."
        ) from error


def as_made(config: RunConfig, store: Store) -> RunConfig:
    """The config with what is true of a store that was there: a preset yields to it."""
    if not config.data.path or not is_store(config.data.path):
        return config
    data = made_with(store, config.data.path)
    return dataclasses.replace(config, data=data)


def resume_step(workdir: Path, resume: Resume, report: Report) -> int | None:
    """The step to go on from, None for a new run.

    Damaged newer steps are set aside, with a message; what a killed save left is
    cleared.
    """
    checkpoints = workdir / "checkpoints"
    steps = checkpoint.steps(checkpoints) if checkpoints.is_dir() else []
    if resume == "never" and (steps or (workdir / "config.yaml").exists()):
        raise ValueError(
            f"resume='never' needs a workdir without a run. Got {workdir}, which holds one."
        )
    if not steps and (aside := sorted(checkpoints.glob("damaged-*"))):
        raise ValueError(
            f"{workdir} has no checkpoint but one that was set aside, {aside[-1].name}, "
            "and a run is never restarted silently: use another workdir."
        )
    if not steps and (workdir / "summary.json").exists():
        raise ValueError(
            f"{workdir} holds a finished run whose checkpoints are gone, and it is never "
            "written over: use another workdir."
        )
    if not steps and (workdir / "config.yaml").exists():
        report(f"{workdir} holds a run without a checkpoint: it starts at step 0")
    good = checkpoint.newest_good(checkpoints, report=lambda _: None) if steps else None
    if steps and good is None:
        reasons = " ".join(
            checkpoint.verify(checkpoints / f"{step:08d}") or "" for step in steps
        )
        raise ValueError(
            f"{workdir} has no good checkpoint to resume from, and a run is never restarted silently. {reasons}"
        )
    for step in steps:
        if good is not None and step > good:
            reason = checkpoint.verify(checkpoints / f"{step:08d}")
            report(
                f"{reason} It is set aside as {checkpoint.set_aside(checkpoints, step).name}."
            )
    if good is not None:
        checkpoint.clear(checkpoints, hold=extend.held_steps(read_config(workdir)))
    if resume == "must" and good is None:
        raise ValueError(
            f"resume='must' needs a workdir with a checkpoint. Got {workdir}, which has none."
        )
    return good


def read_config(workdir: Path) -> RunConfig | None:
    """What a run was begun with; None if nothing says so."""
    path = workdir / "config.yaml"
    return run_config.load(path) if path.exists() else None


@contextlib.contextmanager
def held(workdir: Path, report: Report) -> Iterator[None]:
    """Keeps other processes out of a run directory, until this one ends in whatever way.
    A new directory is made; it goes again if no run begins and nothing is in it.

    Raises:
        RuntimeError: another process trains there.
    """
    path = workdir / ".lock"
    is_new = not workdir.exists()
    with writing(path):
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(file, path):
                raise BlockingIOError
        except BlockingIOError:
            raise RuntimeError(
                f"another process trains in {workdir}: wait for it, or use another workdir."
            ) from None
        except OSError as error:
            report(
                f"{workdir} cannot be locked ({error.strerror}): train here once only"
            )
        try:
            yield
        finally:
            if is_new and not (workdir / "config.yaml").exists():
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # what else is there stays
                    workdir.rmdir()


def _is_at(file: IO, path: Path) -> bool:
    """Whether an open file still has its name: who never began takes the lock away."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def check_same(config: RunConfig, workdir: Path, store: Store) -> None:
    """Raises a ValueError unless a run that is there has the same config and
    tokenizer, since without it nobody can read its steps again. It may have had fewer
    steps, and looked at itself otherwise (`provenance.WATCHING`).
    """
    path, own = workdir / "config.yaml", workdir / "tokenizer.json"
    tokenizer = (store.directory / "tokenizer.json").read_bytes()
    if own.is_file() and own.read_bytes() != tokenizer:
        raise ValueError(
            f"{store.directory} must have the tokenizer of {workdir}, {own}: with "
            "another one its steps could not be read again. Use another workdir."
        )
    if not path.exists():
        return
    written, steps = run_config.load(path), config.train.steps
    if steps > written.train.steps:
        written = extend.with_steps(written, steps)
    provenance.check_settings(workdir, written, config, provenance.WATCHING)


FILES = ("tokenizer.json", "env.json", "metrics.jsonl", "REPORT.md")


def check_free(workdir: Path) -> None:
    """Raises a ValueError for a folder that is no run's and has files that a run would
    write over.
    """
    found = [name for name in FILES if (workdir / name).exists()]
    if found and not (workdir / "config.yaml").exists():
        raise ValueError(
            f"{workdir} holds {', '.join(found)} and is no run, which has a config.yaml: a "
            "new run would write over them. Use another workdir."
        )


def finished(run: Run, step: int | None) -> dict[str, Any] | None:
    """The summary of a run that goes on from its last step; None if there is anything
    to train, or no summary of all steps.
    """
    summary = _read(run.workdir / "summary.json")
    is_last = step == run.config.train.steps
    return summary if is_last and summary and summary.get("steps") == step else None


def settle(run: Run, step: int | None) -> None:
    """Writes the resolved config, the tokenizer and the environment; those of a run
    which is finished stay, since they say where its numbers come from.
    """
    workdir, tree = run.workdir, to_tree(run.config)
    tokenizer = (run.store.directory / "tokenizer.json").read_bytes()
    workdir.mkdir(parents=True, exist_ok=True)
    is_finished = bool(finished(run, step))
    if not is_finished or not (workdir / "config.yaml").exists():
        write_whole(workdir / "config.yaml", yaml.safe_dump(tree, sort_keys=False))
    write_whole(workdir / "tokenizer.json", tokenizer)
    path = workdir / "env.json"
    if not is_finished or not _read(path):
        write_json(path, metrics.environment(run.devices))


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where it is missing or damaged."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
