"""`trix-jax train CONFIG.yaml --workdir DIR`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from trix_jax.cli.common import be_deterministic, print_json, say
from trix_jax.lm import hosts
from trix_jax.lm.config import RunConfig
from trix_jax.lm.data import check_typed
from trix_jax.lm.presets import parse_preset, value_of
from trix_jax.lm.train import initial
from trix_jax.lm.train.loop import train


@dataclasses.dataclass(frozen=True)
class Args:
    """Train a preset, or go on with the run in --workdir."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    workdir: str = "runs/train"
    """The run directory."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with a run that is there; refuse one; demand one."""
    init_from: str | None = None
    """Start a new run from the weights of a run (its best step), of a step's folder in
    its checkpoints, or of an export of real weights; the model is its own unless typed.
    """
    other_data: bool = False
    """Go on with a run though the data is not what it was trained on."""
    deterministic: bool = False
    """Bit-identical repeats on a GPU too (slower)."""
    distributed: bool = False
    """Be one of several processes that train one model (docs/launch)."""
    shard_state: bool = False
    """Spread parameters and optimizer state over the devices, for models that do not
    fit.
    """
    shard_tiles: int = 1
    """Spread the tiles of each layer over this many devices; tokens travel to them."""
    trace_steps: int = 0
    """Trace this many steps into DIR/trace, for xprof."""
    json: bool = False
    """End standard output with the summary as one line of JSON."""


def main(argv: list[str]) -> None:
    """Trains, or goes on with the run in the workdir, and writes its report."""
    args = parse_preset(Args, argv, "train", _model_of(argv))
    check_typed(args.config.data, argv)
    if args.trace_steps < 0:
        raise ValueError(f"trace_steps must not be negative. Got {args.trace_steps}.")
    if args.deterministic:
        be_deterministic()
    if args.distributed:
        hosts.join()
    report = say(args.json) if hosts.is_first() else lambda _: None
    summary = train(
        args.config,
        args.workdir,
        resume=args.resume,
        init_from=args.init_from,
        other_data=args.other_data,
        shard_state=args.shard_state,
        shard_tiles=args.shard_tiles,
        trace_steps=args.trace_steps,
        report=report,
    )
    if hosts.is_first():
        # Plots take seconds to import, and a mistake needs none.
        from trix_jax.cli.report import run_report

        report(f"read {run_report(args.workdir, report)}")
        if args.json:
            print_json(summary)
    hosts.wait_for_all("the report is written")


def _model_of(argv: list[str]) -> RunConfig | None:
    """The settings that a run with --init-from has where none are typed."""
    flags = [
        flag.replace("_", "-", 1) if flag.startswith("--init_from") else flag
        for flag in argv
    ]
    workdir = value_of("--workdir", argv) or Args.workdir
    return initial.defaults(Path(workdir), value_of("--init-from", flags))
