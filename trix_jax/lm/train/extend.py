"""More steps for a run that is there: `train.steps` raised.

An extended run equals one that had all its steps from the beginning, bit for bit. So it
goes on from a step up to which nothing has depended on the run's length (`stable_until`):
a constant rate never does, that of "wsd" until it falls, that of "cosine" always. A run
saves a checkpoint at that step and keeps it. What it did behind it stays as a run
directory of its own, `steps-N`.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trix_jax.files import write_whole
from trix_jax.lm.checkpoint import checkpoint, step_files
from trix_jax.lm.config import RunConfig
from trix_jax.lm.train.optimizer import decay_begins

Report = Callable[[str], None]
FILES = "config.yaml tokenizer.json env.json metrics.jsonl summary.json init.json"


class Limit(NamedTuple):
    """The last step that is the same in a longer run.

    Attributes:
        why: what depends on the run's length behind it.
    """

    step: int
    why: str


def stable_until(config: RunConfig) -> Limit:
    """Up to where a run does what a longer one of the same settings does."""
    return min(_limits(config), key=lambda limit: limit.step)


def _limits(config: RunConfig) -> list[Limit]:
    train, ternary, steps = config.train, config.model.ternary, config.train.steps
    first = ternary.full_precision_fraction
    has_latent = config.model.has_ternary_products
    limits = [Limit(steps, "it ends there")]
    if train.schedule == "cosine":
        limits.append(
            Limit(0, "train.schedule=cosine sets every rate by the last step")
        )
    if train.schedule == "wsd":
        begin = decay_begins(train)
        limits.append(Limit(begin, f"the rate falls from step {begin} on"))
    if train.warmup_steps > steps:
        longer = f"train.warmup_steps={train.warmup_steps} is longer than the run"
        limits.append(Limit(0, longer))
    if train.weight_decay and 0 < train.decay_until < 1:
        why = f"train.decay_until={train.decay_until} ends weight decay by the run's length"
        limits.append(Limit(math.floor(train.decay_until * steps), why))
    after = config.model.routing.hold_after
    if config.model.ffn != "dense" and after is not None and after < 1:
        why = f"model.routing.hold_after={after} holds addresses by the run's length"
        limits.append(Limit(math.floor(after * steps), why))
    if has_latent and (
        ternary.mode == "progressive" or (ternary.mode == "ste" and first)
    ):
        why = f"weights become ternary by the run's length (model.ternary.full_precision_fraction={first}, mode={ternary.mode})"
        limits.append(Limit(math.floor(first * steps), why))
    return limits


def is_part_of(step: int, steps: int, config: RunConfig) -> bool:
    """Whether a step of a run of `steps` is one of `config`'s as well, which has more."""
    if steps >= config.train.steps:
        return False
    return step <= stable_until(with_steps(config, steps)).step


def first_step(workdir: Path, before: RunConfig, steps: int, newest: int) -> int:
    """The step that a run goes on from to have `steps`: its newest, or where it is
    extended the newest good one that is part of the longer run.

    Raises:
        ValueError: none is; says why, and what to do.
    """
    was = before.train.steps
    if steps <= was:
        return newest
    limit, checkpoints = stable_until(before), workdir / "checkpoints"
    good = checkpoint.newest_good(checkpoints, report=lambda _: None, up_to=limit.step)
    if good:
        return good
    kept = "" if limit.step == 0 else f" Its checkpoint of step {limit.step} is gone."
    raise ValueError(
        f"{workdir} holds a run of {was} steps that cannot be extended to {steps}: "
        f"{limit.why}.{kept} To start a new run from its weights: --init-from {workdir} in "
        "another workdir. Runs of train.schedule constant or wsd keep a checkpoint to be "
        "extended from."
    )


def held_steps(config: RunConfig | None) -> set[int]:
    """The steps that stay, because the run can be extended from them."""
    return {stable_until(config).step} if config else set()


def extend(
    workdir: Path, before: RunConfig, steps: int, step: int, report: Report
) -> None:
    """Makes room for a run of `steps` that goes on from `step`: what the run has behind
    it moves to `steps-N`, N the steps it had, with copies of its files.

    At every moment a step is whole in one of the two, the config of the longer run is
    written only afterwards, and a second call does what a killed one did not.
    """
    checkpoints, aside = (
        workdir / "checkpoints",
        workdir / f"steps-{before.train.steps}",
    )
    later = [s for s in checkpoint.steps(checkpoints) if s > step]
    if later:
        _copy_files(workdir, aside)
    for number in later:
        step_files.move(checkpoints, number, aside / "checkpoints")
    (workdir / "summary.json").unlink(missing_ok=True)
    kept = f"; kept in {aside}: {', '.join(map(str, later))}" if later else ""
    report(
        f"extending {workdir} from {before.train.steps} to {steps} steps, from step "
        f"{step} on{kept}"
    )


def _copy_files(workdir: Path, aside: Path) -> None:
    aside.mkdir(exist_ok=True)
    for path in (workdir / name for name in FILES.split()):
        if path.is_file():
            write_whole(aside / path.name, path.read_bytes())
    if (workdir / "data").is_dir() and not (aside / "data").exists():
        (aside / "data").symlink_to("../data")


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The config of a run of another length."""
    train = dataclasses.replace(config.train, steps=steps)
    return dataclasses.replace(config, train=train)
