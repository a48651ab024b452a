"""The model card of an export: README.md with a hub's front matter, from measurements.

The words follow from the numbers, whoever wins, and from the variables and the config
that are exported. What is stated was measured on the exported model at the time of
export; the floors are n-grams counted on the same split.
"""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from trix_jax.interop.safetensors import stored
from trix_jax.lm import ngram
from trix_jax.lm.accounting import active_width, costs
from trix_jax.lm.data import Store, Tokenizer
from trix_jax.lm.serve.export import load, part_bytes
from trix_jax.lm.train.evaluate import Evaluation, evaluate
from trix_jax.lm.train.exported import CONFIG, TOKENIZER, WEIGHTS
from trix_jax.lm.train.metrics import bits
from trix_jax.nn.route_table import layers_by_token, tables_in
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.ops import PACKED
from trix_jax.typing import Variables

Tensors = dict[str, np.ndarray]  # as stored, by name

CARD = "README.md"
SHA256 = f"sha256 of `{WEIGHTS}`: "
HEAD = """---
library_name: trix-jax
pipeline_tag: text-generation
tags: [{tags}]
---
"""
ADDRESSES = {  # by `routing.source`
    "weights": "there is no learned router, a tile's address is read off its own weights",
    "learned": "a learned router has a row for each tile",
    "random": "there is no learned router, a tile's address is a random row that does not train",
    "hash": "there is no learned router, a token's tiles are a hash of its id",
}
HELD = "there is no learned router, a tile's address is what its own weights were when it was held"


def write_card(
    directory: str | Path, store: Store, about: dict[str, Any], batch_size: int = 64
) -> Path:
    """Evaluates an export and writes its card beside it.

    Args:
        directory: what `export` wrote.
        store: the data that it was trained on.
        about: of the run, up to the step that is exported: `arm`, `seed`, `steps`,
            `tokens`, `seconds`, `git_commit`; `init_from` and `data_since` where it did
            not begin with drawn weights, or on this data.
        batch_size: sequences in an evaluation batch.

    Returns:
        The card.
    """
    directory = Path(directory)
    model, variables, _ = load(directory)
    result = evaluate(model, variables, store, batch_size)
    counted = min(len(store.train), ngram.COUNTED)
    scored = min(result.tokens, ngram.COUNTED)
    floors = ngram.floors(store, most=counted, scored=scored)
    files = {
        name: (directory / name).stat().st_size for name in (WEIGHTS, CONFIG, TOKENIZER)
    }
    is_packed = _is_packed(variables)
    tensors, _ = stored(directory / WEIGHTS)
    parts = [
        _head(model.config.ffn, is_packed),
        _what(model, variables, tensors),
        "## Results",
        _measured(result, counted, scored),
        _results(result, floors, is_packed),
        "## Data and training",
        _training(store, about),
        "## Limits",
        _limits(result, floors, model.config, about),
        "## Use",
        _use(store.tokenizer, is_packed, _real_dtype(tensors)),
        "## Files",
        "\n".join(f"- `{name}`, {size:,} bytes" for name, size in files.items()),
        f"{SHA256}{_sha256(directory / WEIGHTS)}",
    ]
    path = directory / CARD
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def check_card(directory: str | Path) -> None:
    """Compares the card of an export, where there is one, with its weights.

    Raises:
        ValueError: the card tells of other weights.
    """
    if said := of_other_weights(directory):
        raise ValueError(said)


def of_other_weights(directory: str | Path) -> str | None:
    """Says so, and what to do, where the card beside an export is that of another."""
    directory = Path(directory)
    card = directory / CARD
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    told = re.search(rf"{re.escape(SHA256)}([0-9a-f]+)", text)
    if told is None or told[1] == _sha256(directory / WEIGHTS):
        return None
    return (
        f"{card} tells of other weights than {WEIGHTS}: `trix-jax export --card` writes "
        "it anew."
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _head(ffn: str, is_packed: bool) -> str:
    tags = "trix, ternary, 2-bit, jax, flax" if is_packed else "trix, jax, flax"
    is_dense = ffn == "dense"
    title = "A dense language model" if is_dense else f"A TriX language model ({ffn})"
    return f"{HEAD.format(tags=tags)}\n# {title}"


def _is_packed(variables: Variables) -> bool:
    """Whether any weights are ternary, in two bits."""
    return any(path[-1] == "bits" for path in flatten_dict(variables.get(PACKED, {})))


def _real_dtype(tensors: Tensors) -> str:
    """The dtype of the parameters in the file."""
    (name,) = {str(v.dtype) for k, v in tensors.items() if k.startswith("params.")}
    return name


def _what(model: TransformerLM, variables: Variables, tensors: Tensors) -> str:
    c = model.config
    cost = costs(c)
    text = (
        f"A decoder of {c.n_layers} layers, width {c.d_model}, context {c.context}, "
        f"{cost.total:,} parameters, {cost.ffn:,} of them in its feed-forward layers."
    )
    if c.ffn == "dense":
        return f"{text} These are dense."
    tables = tables_in(flatten_dict(variables))
    width = active_width(c, "table" if tables else "signatures")
    stored = part_bytes({name: value.nbytes for name, value in tensors.items()})["ffn"]
    text += (
        f" These are cut into {c.num_tiles} tiles of which a token computes "
        f"{c.tiles_per_token}, an active width of {width:.0f}; "
        f"{_addresses(c, variables)}. "
    )
    if c.shared_width:
        text += (
            f"A real FFN of width {c.shared_width} beside them, counted with them, "
            "computes for every token. "
        )
    text += f"They take {stored:,} bytes"
    if not _is_packed(variables):
        return f"{text}, in {_real_dtype(tensors)}."
    return f"{text}, {4 * cost.ffn / stored:.1f} times fewer than in float32."


def _addresses(c: TransformerConfig, variables: Variables) -> str:
    """How a token finds its tiles."""
    flat: dict[tuple[str, ...], Any] = flatten_dict(variables)
    source = c.routing.source
    is_held = any(np.any(v) for path, v in flat.items() if path[-1] == "held")
    text = HELD if source == "weights" and is_held else ADDRESSES[source]
    if source == "hash" and c.router_input == "pair":
        text += " and the one before"
    if c.hash_per_layer:
        text += ", another in every layer"
    if c.routing.hash_sets is not None:
        text += f", those of {c.routing.sets_per_token} of {c.routing.hash_sets} sets"
    if tables_in(flat):
        by_token = layers_by_token(c)
        where = (
            f" in the first {by_token} of {c.n_layers} layers"
            if by_token < c.n_layers
            else ""
        )
        text += f", and what that chooses for each token is stored as a table{where}"
    return text


def _measured(result: Evaluation, counted: int, scored: int) -> str:
    text = f"On the whole validation split, {result.tokens:,} tokens. "
    text += f"N-grams are counted over {counted:,} training tokens"
    if scored < result.tokens:
        text += f", and scored on the first {scored:,} of validation"
    return f"{text}."


def _results(result: Evaluation, floors: dict[int, float], is_packed: bool) -> str:
    rows = [
        f"| this model{', packed' * is_packed} | {result.val_loss:.4f} | {result.val_ppl:.3f} | {bits(result.val_bits_per_byte)} |"
    ]
    known = result.val_bits_per_byte
    per_nat = None if known is None else known / result.val_loss
    rows += [
        f"| {order}-gram counts | {loss:.4f} | {math.exp(loss):.3f} | "
        f"{bits(None if per_nat is None else loss * per_nat)} |"
        for order, loss in floors.items()
    ]
    head = "| | nats a token | perplexity | bits a byte |\n|---|---:|---:|---:|"
    return "\n".join([head, *rows])


def _training(store: Store, about: dict[str, Any]) -> str:
    commit = f", commit {about['git_commit']}" if about.get("git_commit") else ""
    text = (
        f"Source: {store.manifest['source']}; {len(store.train):,} training tokens "
        f"(fingerprint {store.fingerprint[:16]}). Arm {about['arm']}, seed {about['seed']}: "
        f"{about['steps']:,} steps over {about['tokens']:,} tokens in "
        f"{about['seconds']:,.0f} seconds, compiling and evaluations included{commit}."
    )
    if since := about.get("data_since"):
        text += (
            f" Its first {since:,} steps were on other data, which is not named here."
        )
    if first := about.get("init_from"):
        what = (
            "an export" if first["step"] is None else f"step {first['step']:,} of a run"
        )
        text += (
            f" It began with the weights of {what} (sha256 {first['sha256'][:16]}), whose "
            "training is counted nowhere here."
        )
    return text


def _limits(result, floors, c: TransformerConfig, about) -> str:
    lost = [order for order, loss in floors.items() if loss <= result.val_loss]
    beaten = [order for order in floors if order not in lost]
    lines = [
        f"- One run, one seed ({about['seed']}): nothing is said of the spread over seeds.",
        f"- It sees at most {c.context} tokens at a time.",
        f"- {_met(about)}; nothing was done about what it may say.",
    ]
    if lost:
        lines.insert(0, f"- Counting alone does better: {_orders(lost)}.")
    if beaten:
        lines.insert(
            0,
            f"- It is better than {_orders(beaten)} of the same text, and no more is claimed.",
        )
    return "\n".join(lines)


def _met(about: dict[str, Any]) -> str:
    if about.get("data_since") or about.get("init_from"):
        return (
            "It has met other text than its training data, of which this validation text "
            "may be a part"
        )
    return "It has met no text but its training data"


def _orders(orders: list[int]) -> str:
    return ", ".join(f"{order}-grams" for order in orders)


def _use(tokenizer: Tokenizer, is_packed: bool, dtype: str) -> str:
    has_text = tokenizer.kind != "none"
    ids = 'tokenizer.encode("the ")' if has_text else "[0, 1, 2]"
    prompt = "--prompt TEXT" if has_text else "--prompt-ids 0 1 2"
    weights = (
        "Ternary weights are two bits\neach, in the format that trix_jax documents in "
        f"`trix_kernels/packing.py`, and all others\n{dtype}."
        if is_packed
        else f"The weights are {dtype}."
    )
    return f"""```python
import jax.numpy as jnp
from trix_jax import load_run

model, variables, tokenizer = load_run("PATH OF THIS FOLDER")
tokens = jnp.asarray({ids})[None]
logits, routing_infos, _ = model.apply(variables, tokens)
```

or `trix-jax generate --checkpoint PATH {prompt}`. {weights}"""
