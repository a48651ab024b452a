"""`trix-jax demo`."""

import dataclasses

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Train a small TriX, its dense twin and a dense model of its cost, compare, pack,
    generate and report. No download.
    """

    workdir: str = "runs/demo"
    """Where everything goes; a demo that was stopped there goes on."""
    steps: int = 600
    """Optimizer steps of each arm."""
    seed: int = 42
    """Of all arms."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Runs the demo and prints its table."""
    args = parse(Args, argv, "demo")
    from trix_jax.lm.demo import run_demo

    report = say(args.json)
    result = run_demo(args.workdir, steps=args.steps, seed=args.seed, report=report)
    report("")
    for arm, values in result["arms"].items():
        report(
            f"{arm:<7} validation loss {values['val_loss']:.4f}  perplexity "
            f"{values['val_ppl']:.3f}  bits per byte {values['val_bits_per_byte']:.4f}  "
            f"{values['params_total']:,} parameters, {values['ffn_active']:,} FFN "
            "multiply-accumulates a token"
        )
    sizes = result["bytes"]
    report(
        f"FFN weights {sizes['ffn_float32']:,} bytes, packed {sizes['ffn_packed']:,}: "
        f"{sizes['ffn_float32'] / sizes['ffn_packed']:.1f} times fewer"
    )
    report(f"{result['seconds']:.0f} seconds. Read {args.workdir}/REPORT.md")
    if args.json:
        print_json(result)
