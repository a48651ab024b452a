"""`trix-jax track --workdir DIR --to tensorboard`."""

import dataclasses
from typing import Literal

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Send a run's metrics to TensorBoard or Weights & Biases."""

    workdir: str
    """The run directory."""
    to: Literal["tensorboard", "wandb"]
    """The tracker, whose extra must be installed."""
    follow: bool = False
    """Go on while the run trains."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Sends what there is, and with --follow what comes."""
    args = parse(Args, argv, "track")
    from trix_jax.lm.report.trackers import track

    try:
        count = track(args.workdir, args.to, follow=args.follow)
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"the {args.to} extra is needed: pip install -e '.[{args.to}]' in a clone ({error})."
        ) from error
    say(args.json)(f"{count:,} lines of metrics sent to {args.to}")
    if args.json:
        print_json({"workdir": args.workdir, "to": args.to, "lines": count})
