"""`trix-jax export --checkpoint DIR --output DIR`."""

import dataclasses

from trix_jax.cli.common import parse, print_json, say


@dataclasses.dataclass(frozen=True)
class Args:
    """Write a run as packed safetensors, config and tokenizer."""

    checkpoint: str
    """The run directory."""
    output: str
    """Where model.safetensors, config.json and tokenizer.json go."""
    step: str = "latest"
    """latest (the newest good one), best, or a number."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Exports a run."""
    from trix_jax.lm.evaluate import load_run
    from trix_jax.lm.export import export

    args = parse(Args, argv, "export")
    model, variables, tokenizer = load_run(args.checkpoint, args.step)
    sizes = export(model, variables, tokenizer, args.output)
    ratio = sizes["ffn_float32"] / sizes["ffn_packed"]
    say(args.json)(
        f"{args.output}: FFN weights {sizes['ffn_float32']:,} bytes in float32, "
        f"{sizes['ffn_packed']:,} packed with their scales, {ratio:.2f} times fewer"
    )
    if args.json:
        print_json({"output": args.output, **sizes, "ratio": ratio})
