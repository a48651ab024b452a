"""`trix-jax eval --checkpoint DIR`."""

import dataclasses
from pathlib import Path

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Restore a run or an export and evaluate it on a validation split."""

    checkpoint: str
    """The run directory, or an export."""
    step: str = "latest"
    """Of a run: latest (the newest good one), best, or a number."""
    data: str | None = None
    """A token store; by default the run's own."""
    batch_size: int | None = None
    """Sequences in a batch; by default the run's own, and 64 of an export."""
    tokens: int = 0
    """Validation tokens, from the first, in whole windows; 0 takes all."""
    context: int | None = None
    """Tokens in a window, by default as trained; more only for a model that has
    positions for them."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Evaluates a run or an export."""
    from trix_jax.lm.serve.load import (
        eval_batch_size,
        load_run,
        open_run_data,
        resolve_step,
    )
    from trix_jax.lm.train.evaluate import evaluate
    from trix_jax.lm.train.metrics import in_words
    from trix_jax.ops import implementation

    args = parse(Args, argv, "eval")
    report = say(args.json)
    if args.tokens < 0:
        raise ValueError(f"tokens must not be negative. Got {args.tokens}.")
    directory = Path(args.checkpoint)
    number = resolve_step(directory, args.step)
    model, variables, _ = load_run(directory, args.step if number is None else number)
    store = open_run_data(directory, args.data)
    trained = model.config.context
    context = trained if args.context is None else args.context
    size = args.batch_size
    size = eval_batch_size(directory) if size is None else size
    windows = {"context": context, "most": args.tokens}
    result = evaluate(model, variables, store, size, **windows)
    if context != trained:
        past = "past" if context > trained else "short of"
        report(f"windows of {context} tokens, {past} the {trained} it was trained with")
    report(
        f"validation loss {result.val_loss:.4f} nats a token, perplexity "
        f"{result.val_ppl:.3f}, {in_words(result.val_bits_per_byte)}, "
        f"{result.tokens:,} tokens"
        f"{f' of {len(store.val) - 1:,}, from the first' if args.tokens else ''}"
    )
    if result.val_loss_unquantized is not None:
        report(f"unquantized, as it trained: {result.val_loss_unquantized:.4f}")
    c = model.config
    how = c.ternary.activations, c.dtype, c.implementation
    runs = implementation(variables, *how)
    report(f"ternary matmuls: {runs}")
    if args.json:
        print_json(
            {
                "val_loss": result.val_loss,
                "val_loss_unquantized": result.val_loss_unquantized,
                "val_ppl": result.val_ppl,
                "val_bits_per_byte": result.val_bits_per_byte,
                "tokens": result.tokens,
                "context": context,
                "step": number,
                "entropy": result.entropy,
                "max_load": result.max_load,
                "dead_tiles": result.dead_tiles,
                "implementation": runs,
            }
        )
