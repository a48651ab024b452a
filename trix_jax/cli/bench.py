"""`trix-jax bench`: the layers' speed on this machine."""

import dataclasses

from trix_jax.cli.common import parse, print_json, say


@dataclasses.dataclass(frozen=True)
class Args:
    """Measure the layers against dense FFNs, as ratios of medians: greater is better
    for TriX.
    """

    rounds: int = 7
    """How often each function is timed."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Measures and prints."""
    from trix_jax.lm.bench import bench

    args = parse(Args, argv, "bench")
    if args.rounds < 2:
        raise ValueError(f"rounds must be at least 2. Got {args.rounds}.")
    report = say(args.json)
    result = bench(args.rounds, report)
    for granularity, ratio in result["packed_ratios"].items():
        report(f"scales per {granularity}: {ratio:.2f} times fewer bytes than float32")
    if args.json:
        print_json(result)
