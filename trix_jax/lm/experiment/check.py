"""Whether the runs of a directory that have ended are those that are asked for: a name
says size, arm and seed, and nothing of `set`.
"""

import dataclasses
import shlex
from pathlib import Path

from trix_jax.files import read_json
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import RunConfig, load
from trix_jax.lm.data import is_store
from trix_jax.lm.data.store import read_manifest
from trix_jax.lm.experiment.directory import has_ended
from trix_jax.lm.experiment.results import read
from trix_jax.lm.experiment.spec import RESULTS, Experiment, Spec, public_command
from trix_jax.lm.train import extend
from trix_jax.lm.train.provenance import check_settings


def check_ended(experiment: Experiment, workdir: Path) -> None:
    """Compares every run that has ended to what is asked for now; reads alone. Of a run
    whose directory is gone the record tells the command.

    Raises:
        ValueError: one has other settings or other data; names it and them.
    """
    folder, path = workdir / "runs", workdir / RESULTS
    known = {one.name: one for one in read(path)}
    for spec in experiment.specs:
        before = known[spec.name].command if spec.name in known else None
        if before and not (folder / spec.name).exists():
            now = public_command(spec)
            if _flags(before) != _flags(now):
                raise ValueError(
                    f"{path} holds {spec.name}, made by `{before}`, and its directory is "
                    f"gone. Now it would be `{now}`. Use another workdir, or delete that "
                    "file too."
                )
        directory = folder / spec.name
        if has_ended(spec, folder) or _is_of_other_length(spec, directory):
            asked = experiment.configs[spec.size, spec.arm]
            asked = dataclasses.replace(asked, seed=spec.seed)
            written = load(directory / "config.yaml")
            if (steps := asked.train.steps) > written.train.steps:
                extend.first_step(directory, written, steps, written.train.steps)
                written = extend.with_steps(written, steps)
            check_settings(directory, written, _filled_in(asked, written))
            _check_data(directory, workdir / spec.store)


def _is_of_other_length(spec: Spec, directory: Path) -> bool:
    try:
        summary = read_json(directory / "summary.json")
    except (OSError, ValueError):  # none, or damaged: it is written anew
        return False
    return summary["steps"] != spec.steps


def _flags(command: str) -> list[str]:
    """A command's flags and the name of its preset, in whatever order and place."""
    found: list[str] = []
    for word in shlex.split(command):
        if found and found[-1].startswith("--") and not word.startswith("--"):
            found[-1] += f" {word}"
        else:
            found.append(Path(word).name)
    return sorted(found)


def _filled_in(asked: RunConfig, written: RunConfig) -> RunConfig:
    """With what training fills in (`trix_jax.lm.config.resolve`) as the run has it: the
    tokenizer's numbers, which belong to the data, and a sampler that is left open.
    """
    own = {name: getattr(written.model, name) for name in ("vocab_size", "end_token")}
    sampler = asked.train.sampler or written.train.sampler
    return dataclasses.replace(
        asked,
        model=dataclasses.replace(asked.model, **own),
        train=dataclasses.replace(asked.train, sampler=sampler),
    )


def _check_data(directory: Path, store: Path) -> None:
    """Raises a ValueError if a run's newest checkpoint was trained on another store;
    without a checkpoint or the store nobody can tell.
    """
    checkpoints = directory / "checkpoints"
    steps = checkpoint.steps(checkpoints)
    if not steps or not is_store(store):
        return
    before = checkpoint.read_meta(checkpoints, steps[-1])["data_fingerprint"]
    if before != (now := read_manifest(store)["fingerprint"]):
        raise ValueError(
            f"{directory} holds a run on other data: its fingerprint is {before[:12]}, "
            f"that of {store} is {now[:12]}. Use another workdir, or the same data."
        )
