"""`trix-jax bench`: the speed of the layers on this machine."""

import dataclasses
from pathlib import Path

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the layers against dense FFNs, as medians of ratios within a round:
    greater is better for TriX. Then the import, the data and how cost grows. Some ten
    minutes on two idle cores.
    """

    rounds: int = 7
    """How often each function is timed."""
    output: Path | None = None
    """Folder for bench.json, bench.md and plots."""
    only_layers: bool = False
    """Leave out the import, the data and how cost grows."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Measures and prints."""
    from trix_jax.lm import bench

    args = parse(Args, argv, "bench")
    if args.rounds < 2:
        raise ValueError(f"rounds must be at least 2. Got {args.rounds}.")
    report = say(args.json)
    result = bench.bench(args.rounds, report, bench.SIZES, args.only_layers)
    if args.output is not None:
        for path in bench.write(result, args.output):
            report(f"wrote {path}")
    if args.json:
        print_json(result)
