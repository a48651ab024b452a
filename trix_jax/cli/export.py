"""`trix-jax export --checkpoint DIR --output DIR`."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from trix_jax.cli.common import print_json, say
from trix_jax.files import read_json
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
    routes: Literal["signatures", "table"] = "signatures"
    """A table of each token's tiles and gates scores nothing; it needs routes by token."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the real weights in the file. bfloat16 halves their bytes and rounds them."""
    card: bool = False
    """Evaluate the packed model and write a model card, README.md, from it and the run."""
    stablehlo: bool = False
    """Write model.stablehlo too, a program that JAX runs without this package."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Exports a run."""
    from trix_jax.lm.serve.card import of_other_weights
    from trix_jax.lm.serve.export import check_output, export
    from trix_jax.lm.serve.load import (
        eval_batch_size,
        load_run,
        open_run_data,
        resolve_step,
    )

    args = parse(Args, argv, "export")
    report = say(args.json)
    check_output(args.output)
    number = resolve_step(args.checkpoint, args.step)
    step = args.step if number is None else number
    model, variables, tokenizer = load_run(args.checkpoint, step)
    size = eval_batch_size(args.checkpoint)
    told = None
    if args.card:  # what it needs, before anything is written
        told = open_run_data(args.checkpoint), _about(Path(args.checkpoint), number)
    sizes = export(model, variables, tokenizer, args.output, args.routes, args.dtype)
    weights = f"FFN weights {sizes['ffn_float32']:,} bytes in float32"
    ratio = sizes["ffn_float32"] / sizes["ffn_packed"]
    if model.config.has_ternary_weights:
        weights += f", {sizes['ffn_packed']:,} packed with their scales, {ratio:.2f} times fewer"
    elif args.dtype != "float32":
        weights += f", {sizes['ffn_packed']:,} in {args.dtype}"
    weights += f"; routing {sizes['routes']:,} bytes"
    report(f"{args.output}: {weights}")
    if not told and (said := of_other_weights(args.output)):
        report(said)
    more = _change(args, model, variables, size, report)
    if told:
        from trix_jax.lm.serve.card import write_card

        report(
            f"evaluating {args.output} on all {len(told[0].val) - 1:,} validation tokens"
        )
        card = write_card(args.output, *told, size)
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


def _about(directory: Path, number: int | None) -> dict[str, Any]:
    """What a card says of a run, up to the step that is exported, be it finished or not."""
    from trix_jax.lm.checkpoint.checkpoint import read_meta
    from trix_jax.lm.serve.load import read_config

    if number is None:
        raise ValueError(f"card is of a run, which says its origin. Got {directory}.")
    config, environment = read_config(directory), directory / "env.json"
    a_step = config.train.batch_size * config.model.context
    known = read_json(environment) if environment.exists() else {}
    meta = read_meta(directory / "checkpoints", number)
    return {
        "arm": config.arm,
        "seed": config.seed,
        "steps": number,
        "tokens": number * a_step,
        "seconds": meta["seconds"],
        "git_commit": known.get("git_commit"),
        **{name: meta[name] for name in ("init_from", "data_since") if meta.get(name)},
    }


def _change(args: Args, model, variables, batch_size: int, report) -> dict[str, Any]:
    """What the export does to the validation loss: packing weights that trained
    unquantized to the end, rounding real ones. Nothing where all numbers stay. Of the
    tokens that the run's own evaluations take.
    """
    from trix_jax.lm.serve.load import eval_tokens, load_run, open_run_data
    from trix_jax.lm.train.evaluate import evaluate, trains_as_served

    causes = []
    if not trains_as_served(model.config, 1.0):
        mode = model.config.ternary.mode
        causes += [f"mode {mode!r} trained with real weights and is packed ternary"]
    if args.dtype != "float32":
        causes += [f"real weights are rounded to {args.dtype}"]
    if not causes:
        return {}
    what = ", ".join(causes)
    try:
        store = open_run_data(args.checkpoint)
    except (ValueError, OSError) as error:
        report(f"{what}: its numbers change. By how much is not known: {error}")
        return {}
    most = eval_tokens(args.checkpoint)
    trained = evaluate(model, variables, store, batch_size, most=most)
    before = trained.val_loss_unquantized
    if before is None:
        before = trained.val_loss
    exported, packed, _ = load_run(args.output)
    after = evaluate(exported, packed, store, batch_size, most=most).val_loss
    report(
        f"{what}: validation loss {before:.5f} becomes {after:.5f}, {trained.tokens:,} "
        f"tokens{f' of {len(store.val) - 1:,}, from the first' if most else ''}"
    )
    tokens = trained.tokens
    return {"val_loss": after, "val_loss_before": before, "val_tokens": tokens}
