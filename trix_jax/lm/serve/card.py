"""The model card of an export: README.md with a hub's front matter, from measurements.

The words follow from the numbers, whoever wins. What is stated was measured on the
packed model at the time of export; the floors are n-grams counted on the same split.
"""

import math
from pathlib import Path
from typing import Any

from trix_jax.lm import ngram
from trix_jax.lm.accounting import active_width, costs
from trix_jax.lm.data import Store, Tokenizer
from trix_jax.lm.serve.export import load
from trix_jax.lm.train.evaluate import Evaluation, evaluate
from trix_jax.lm.train.exported import CONFIG, TOKENIZER, WEIGHTS
from trix_jax.lm.train.metrics import bits
from trix_jax.nn.transformer import TransformerConfig

CARD = "README.md"
HEAD = """---
library_name: trix-jax
pipeline_tag: text-generation
tags: [trix, ternary, 2-bit, jax, flax]
---
"""


def write_card(directory: str | Path, store: Store, about: dict[str, Any]) -> Path:
    """Evaluates an export and writes its card beside it.

    Args:
        directory: what `export` wrote.
        store: the data that it was trained on.
        about: the run's `summary.json`: `arm`, `seed`, `steps`, `tokens`, `seconds`,
            `git_commit`.

    Returns:
        The card.
    """
    directory = Path(directory)
    model, variables, _ = load(directory)
    result = evaluate(model, variables, store)
    floors = ngram.floors(store)
    files = {
        name: (directory / name).stat().st_size for name in (WEIGHTS, CONFIG, TOKENIZER)
    }
    parts = [
        f"{HEAD}\n# A TriX language model ({model.config.ffn})",
        _what(model.config),
        "## Results",
        _results(result, floors),
        "## Data and training",
        _training(store, about),
        "## Limits",
        _limits(result, floors, model.config, about),
        "## Use",
        _use(store.tokenizer),
        "## Files",
        "\n".join(f"- `{name}`, {size:,} bytes" for name, size in files.items()),
    ]
    path = directory / CARD
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _what(c: TransformerConfig) -> str:
    cost = costs(c)
    text = (
        f"A decoder of {c.n_layers} layers, width {c.d_model}, context {c.context}, "
        f"{cost.total:,} parameters, {cost.ffn:,} of them in its feed-forward layers."
    )
    if c.ffn == "dense":
        return f"{text} These are dense."
    return (
        f"{text} These are cut into {c.num_tiles} tiles of which a token computes "
        f"{c.tiles_per_token}, an active width of {active_width(c):.0f}; there is no learned "
        f"router, a tile's address is read off its own weights. They take "
        f"{cost.ffn_bits / 8:,.0f} bytes as served, "
        f"{4 * cost.ffn / (cost.ffn_bits / 8):.1f} times fewer than in float32."
    )


def _results(result: Evaluation, floors: dict[int, float]) -> str:
    rows = [
        f"| this model, packed | {result.val_loss:.4f} | {result.val_ppl:.3f} | {bits(result.val_bits_per_byte)} |"
    ]
    known = result.val_bits_per_byte
    per_nat = None if known is None else known / result.val_loss
    rows += [
        f"| {order}-gram counts | {loss:.4f} | {math.exp(loss):.3f} | "
        f"{bits(None if per_nat is None else loss * per_nat)} |"
        for order, loss in floors.items()
    ]
    head = "| | nats a token | perplexity | bits a byte |\n|---|---:|---:|---:|"
    return f"On the whole validation split, {result.tokens:,} tokens.\n\n" + "\n".join(
        [head, *rows]
    )


def _training(store: Store, about: dict[str, Any]) -> str:
    commit = f", commit {about['git_commit']}" if about.get("git_commit") else ""
    return (
        f"Source: {store.manifest['source']}; {len(store.train):,} training tokens "
        f"(fingerprint {store.fingerprint[:16]}). Arm {about['arm']}, seed {about['seed']}: "
        f"{about['steps']:,} steps over {about['tokens']:,} tokens in "
        f"{about['seconds']:,.0f} seconds{commit}."
    )


def _limits(result, floors, c: TransformerConfig, about) -> str:
    lost = [order for order, loss in floors.items() if loss <= result.val_loss]
    beaten = [order for order in floors if order not in lost]
    lines = [
        f"- One run, one seed ({about['seed']}): nothing is said of the spread over seeds.",
        f"- It sees at most {c.context} tokens at a time.",
        "- It has met no text but its training data; nothing was done about what it may say.",
    ]
    if lost:
        lines.insert(0, f"- Counting alone does better: {_orders(lost)}.")
    if beaten:
        lines.insert(
            0,
            f"- It is better than {_orders(beaten)} of the same text, and no more is claimed.",
        )
    return "\n".join(lines)


def _orders(orders: list[int]) -> str:
    return ", ".join(f"{order}-grams" for order in orders)


def _use(tokenizer: Tokenizer) -> str:
    has_text = tokenizer.kind != "none"
    ids = 'tokenizer.encode("the ")' if has_text else "[0, 1, 2]"
    prompt = "--prompt TEXT" if has_text else "--prompt-ids 0 1 2"
    return f"""```python
import jax.numpy as jnp
from trix_jax import load_run

model, variables, tokenizer = load_run("PATH OF THIS FOLDER")
tokens = jnp.asarray({ids})[None]
logits, routing_infos, _ = model.apply(variables, tokens)
```

or `trix-jax generate --checkpoint PATH {prompt}`. The weights are two bits each, in the
format that trix_jax documents in `trix_kernels/packing.py`."""
