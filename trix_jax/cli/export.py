"""`trix-jax export --checkpoint DIR --output DIR`."""

import dataclasses

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Write a run as packed safetensors, config and tokenizer."""

    checkpoint: str
    """The run directory."""
    output: str
    """Where model.safetensors, config.json and tokenizer.json go."""
    step: str = "latest"
    """latest (the newest good one), best, or a number."""
    card: bool = False
    """Evaluate the packed model and write a model card, README.md, from it and the run."""
    stablehlo: bool = False
    """Write model.stablehlo too, a program that JAX runs without this package."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Exports a run."""
    from trix_jax.lm.serve.export import export
    from trix_jax.lm.serve.load import load_run

    args = parse(Args, argv, "export")
    report = say(args.json)
    model, variables, tokenizer = load_run(args.checkpoint, args.step)
    sizes = export(model, variables, tokenizer, args.output)
    ratio = sizes["ffn_float32"] / sizes["ffn_packed"]
    report(
        f"{args.output}: FFN weights {sizes['ffn_float32']:,} bytes in float32, "
        f"{sizes['ffn_packed']:,} packed with their scales, {ratio:.2f} times fewer"
    )
    more = {}
    if args.card:
        from trix_jax.lm.report.record import read_run
        from trix_jax.lm.serve.card import write_card
        from trix_jax.lm.serve.load import open_run_data

        store = open_run_data(args.checkpoint)
        card = write_card(args.output, store, read_run(args.checkpoint).summary)
        more["card"] = str(card)
        report(f"read {card}")
    if args.stablehlo:
        from trix_jax.lm.serve.stablehlo import write_program

        packed, packed_variables, _ = load_run(args.output)
        program = write_program(packed, packed_variables, args.output)
        more["stablehlo"] = str(program)
        report(f"{program}: {program.stat().st_size:,} bytes, tokens to logits")
    if args.json:
        print_json({"output": args.output, **sizes, "ratio": ratio, **more})
