"""`trix-jax train CONFIG.yaml --workdir DIR`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from trix_jax.cli.common import be_deterministic, parse_preset, print_json, say
from trix_jax.lm.config import RunConfig
from trix_jax.lm.report import write_run_report
from trix_jax.lm.train import train


@dataclasses.dataclass(frozen=True)
class Args:
    """Train a preset, or go on with the run in --workdir."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    workdir: str = "runs/train"
    """The run directory."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with a run that is there; refuse one; demand one."""
    deterministic: bool = False
    """Bit-identical repeats on a GPU too (slower)."""
    json: bool = False
    """End standard output with the summary as one line of JSON."""


def main(argv: list[str]) -> None:
    """Trains, or goes on with the run in the workdir, and writes its report."""
    args, reference = parse_preset(Args, argv, "train")
    if args.deterministic:
        be_deterministic()
    report = say(args.json)
    summary = train(
        args.config,
        args.workdir,
        resume=args.resume,
        reference=reference,
        report=report,
    )
    report(f"read {write_run_report(args.workdir)}")
    if args.json:
        print_json(summary)
