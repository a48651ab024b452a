"""What routing does in trained runs, measured on their validation split.

    python -m experiments.quality.measure RUN... --reference DENSE_RUN --data STORE

A RUN is a run directory of `run.py`. What it finds is added to results/doing.json, whose
section of the report is made here too. Difficulty is the loss of the dense run of
--reference on the token; the train-validation gap compares losses on equally many tokens
of both splits.

    information = I(tile; context | token), in nats
    purity = share of tokens whose class is the commonest of their tile
    use distance = total variation between the tiles of hard and of easy tokens

All three are above zero by chance alone, so each comes with what it is when the tiles
are shuffled.

References:
    Cover and Thomas, 2006, "Elements of Information Theory", 2.5. Good, 2005,
    "Permutation, Parametric and Bootstrap Tests of Hypotheses", 3.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, Integer

from trix_jax.files import read_json, write_whole
from trix_jax.lm.config import SAMPLER_BEFORE
from trix_jax.lm.data import Split, Store, eval_batches
from trix_jax.lm.experiment.stats import paired
from trix_jax.lm.experiment.tables import table
from trix_jax.lm.serve.load import load_run, open_run_data, read_config
from trix_jax.nn.transformer import TransformerLM

DOING = Path(__file__).parent / "results" / "doing.json"
BINS = 4
DRAWS = 5  # shuffles
CLASSES = ("lower-case vowel", "lower-case consonant", "capital", "digit", "newline", "space", "other")  # fmt: skip

Ids = Integer[np.ndarray, " T"]
Entry = dict[str, Any]


class Measured(NamedTuple):
    """A number and what chance gives: mean and standard deviation over shuffles."""

    value: float
    chance: float
    spread: float

    @property
    def above_chance(self) -> float:
        return self.value - self.chance


class Observed(NamedTuple):
    """A model on a line of text, an entry a token that it sees.

    Attributes:
        losses: of the token that follows.
        tiles: the best tile of the token, `[layers, T]`; no layers for a dense model.
    """

    tokens: np.ndarray
    losses: np.ndarray
    tiles: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--reference", type=Path, required=True, help="a dense run")
    parser.add_argument("--data", help="token store; None is the run's own")
    parser.add_argument("--out", type=Path, default=DOING)
    args = parser.parse_args(argv)
    store = open_run_data(args.reference, args.data)
    hard = observe(args.reference, store.val).losses
    for run in args.runs:
        found = measure(run, store, hard)
        entries = {key(e): e for e in [*_entries(args.out), found]}
        text = json.dumps([entries[k] for k in sorted(entries)], indent=1)
        write_whole(args.out, f"{text}\n")
        print(f"{found['arm']} seed {found['seed']}: gap {found['gap']:.4f}")


def key(entry: Entry) -> tuple[str, str, float, int]:
    return sampler_of(entry), entry["arm"], entry["learning_rate"], entry["seed"]


def sampler_of(entry: Entry) -> str:
    return entry.get("sampler", SAMPLER_BEFORE)


def measure(run: Path, store: Store, hard: np.ndarray) -> Entry:
    """One run's entry of doing.json."""
    config = read_config(run)
    val = observe(run, store.val)
    train = observe(run, store.train, len(store.val))
    part = bins_of(hard, BINS)
    texts = [store.tokenizer.decode([i]) for i in range(store.tokenizer.vocab_size)]
    classes = np.array([class_of(text) for text in texts])[val.tokens]
    num_tiles = config.model.num_tiles
    layers = [of_layer(t, val.tokens, classes, part, num_tiles) for t in val.tiles]
    return {
        "arm": run.name.rpartition("-lr")[0] or run.name,
        "seed": config.seed,
        "learning_rate": config.train.learning_rate,
        "sampler": config.train.sampler,
        "tokens": len(val.tokens),
        "val_loss": float(val.losses.mean()),
        "train_loss": float(train.losses.mean()),
        "gap": float(val.losses.mean() - train.losses.mean()),
        "loss_by_difficulty": mean_by_bin(val.losses, part),
        "reference_by_difficulty": mean_by_bin(hard, part),
        "layers": layers,
    }


def of_layer(tiles: Ids, tokens: Ids, classes: Ids, part: Ids, num_tiles: int) -> Entry:
    """The measures of one layer; a triple is value, chance, spread of chance.

    Shuffled among equal tokens, tiles keep what follows from the token alone.
    """
    before = np.concatenate([tokens[:1], tokens[:-1]])
    everyone = np.zeros_like(tiles)

    def measured(function: Callable[[Ids], float], groups: Ids) -> list[float]:
        return list(against_chance(function, tiles, groups))

    return {
        "entropy_given_token": conditional_entropy(tiles, tokens),
        "information": measured(lambda t: information(t, before, tokens), tokens),
        "purity": measured(lambda t: purity(t, classes), everyone),
        "use_distance": measured(lambda t: use_distance(t, part, num_tiles), everyone),
        "entropy_by_difficulty": entropy_by_bin(tiles, part, num_tiles),
    }


def observe(run: Path, split: Split, limit: int | None = None) -> Observed:
    """A run's newest checkpoint on the first `limit` tokens of a split, None all, over
    the windows that evaluation takes.
    """
    model, variables, _ = load_run(run)
    step = jax.jit(partial(_step, model))
    seen, done = [], 0
    for batch, mask in eval_batches(split, batch_size=64, context=model.config.context):
        losses, tiles = jax.device_get(step(variables, batch))
        keep = np.asarray(mask, bool).reshape(-1)
        pair = batch[:, :-1].reshape(-1)[keep], losses.reshape(-1)[keep]
        seen.append((*pair, tiles[:, keep]))
        done += int(keep.sum())
        if limit is not None and done >= limit:
            break
    parts = (np.concatenate(part, axis=-1) for part in zip(*seen, strict=True))
    return Observed(*(part[..., :limit] for part in parts))


def _step(model: TransformerLM, variables: Any, batch: Any) -> tuple[Any, Any]:
    outputs: Any = model.apply(variables, batch[:, :-1])
    logits, infos, _ = outputs
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    tiles = [info.tiles[..., 0].reshape(-1) for info in infos if info is not None]
    size = losses.size
    return losses, jnp.stack(tiles) if tiles else jnp.zeros((0, size), jnp.int32)


def information(tiles: Ids, contexts: Ids, tokens: Ids) -> float:
    """Computes `I(tile; context | token)` in nats, of the counts as they are (which is
    biased upwards).
    """
    joint, n = _counts(tokens, contexts, tiles), len(tokens)
    with_context = _counts(tokens, contexts)
    with_tile, alone = _counts(tokens, tiles), _counts(tokens)
    ratio = joint * alone / (with_context * with_tile)
    return float(np.log(ratio).sum() / n)


def conditional_entropy(tiles: Ids, tokens: Ids) -> float:
    """Computes `H(tile | token)` in nats: the most that `information` can be."""
    return float(-np.log(_counts(tokens, tiles) / _counts(tokens)).mean())


def purity(tiles: Ids, classes: Ids) -> float:
    """Computes `sum_tile max_class count(tile, class) / T`."""
    counts = np.zeros((tiles.max() + 1, classes.max() + 1))
    np.add.at(counts, (tiles, classes), 1)
    return float(counts.max(axis=1).sum() / len(tiles))


def use_distance(tiles: Ids, part: Ids, num_tiles: int) -> float:
    """Computes `sum_tile |share in the hardest bin - share in the easiest| / 2`."""
    shares = _use(tiles, part, num_tiles)
    return float(np.abs(shares[-1] - shares[0]).sum() / 2)


def entropy_by_bin(tiles: Ids, part: Ids, num_tiles: int) -> list[float]:
    """Entropy of tile use in each bin, as a share of `ln N`."""
    shares = _use(tiles, part, num_tiles)
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return (-(shares * logs).sum(axis=1) / np.log(num_tiles)).tolist()


def bins_of(difficulty: Float[np.ndarray, " T"], bins: int) -> Ids:
    """Which of `bins` equally large parts of the tokens, easiest first, each is in."""
    order = np.argsort(difficulty, kind="stable")
    part = np.empty(len(difficulty), np.int64)
    part[order] = np.arange(len(difficulty)) * bins // len(difficulty)
    return part


def mean_by_bin(values: Float[np.ndarray, " T"], part: Ids) -> list[float]:
    """Mean of the values in each bin."""
    return (np.bincount(part, values) / np.bincount(part)).tolist()


def class_of(text: str) -> int:
    """The index in `CLASSES` of a token's text: of its first character."""
    first = text[:1]
    if first == "\n":
        return 4
    if first.isspace():
        return 5
    if first.isdigit():
        return 3
    if first.isalpha():
        return 2 if first.isupper() else (0 if first in "aeiou" else 1)
    return 6


def against_chance(
    function: Callable[[Ids], float], tiles: Ids, groups: Ids
) -> Measured:
    """A number of the tiles, and of them shuffled among tokens of equal group."""
    rng = np.random.default_rng(0)
    drawn = [function(shuffled_within(tiles, groups, rng)) for _ in range(DRAWS)]
    return Measured(function(tiles), float(np.mean(drawn)), float(np.std(drawn)))


def shuffled_within(values: Ids, groups: Ids, rng: np.random.Generator) -> Ids:
    """The values permuted at random among the places of equal group."""
    out = np.empty_like(values)
    places = np.argsort(groups, kind="stable")
    out[places] = values[np.lexsort((rng.random(len(values)), groups))]
    return out


def section(folder: Path) -> list[str]:
    """The report's section, from `doing.json`, one a sampler; nothing where nothing was
    measured.
    """
    entries = _entries(folder / "doing.json")
    samplers = dict.fromkeys(map(sampler_of, entries))
    groups = [[e for e in entries if sampler_of(e) == name] for name in samplers]
    return [part for group in groups for part in _section(group)]


def _section(entries: list[Entry]) -> list[str]:
    """What was measured of runs with one sampler."""
    return [
        "## What routing does\n",
        "Measured by `python -m experiments.quality.measure` on the validation split; in brackets "
        "what chance gives with the tiles shuffled. A token's tile is the best of those it chose. "
        f"Means over layers. Sampler: `{sampler_of(entries[0])}`.\n",
        specialization([entry for entry in entries if entry["layers"]]),
        "Information: what the tile tells about the previous token once the token itself is known, "
        "as a share of all that is left to know about the tile, chance subtracted. Purity: share of "
        "tokens that are of their tile's commonest class. Use distance: total variation between the "
        "tiles of the hardest and the easiest quarter of tokens.\n",
        "### Loss by difficulty\n",
        difficulty(entries),
        "Quarters of the validation tokens by the loss of a dense run, easiest first.\n",
        "### Train-validation gap\n",
        gaps(entries),
    ]


def specialization(entries: list[Entry]) -> str:
    """Rows: arm and seed; columns: the three measures and the entropy by difficulty."""
    rows = []
    for entry in entries:
        layers = entry["layers"]
        names = ("information", "purity", "use_distance")
        means = [np.mean([layer[name] for layer in layers], axis=0) for name in names]
        told, pure, apart = (
            f"{value:.3f} ({chance:.3f})" for value, chance, _ in means
        )
        left = np.mean([layer["entropy_given_token"] for layer in layers])
        share = (means[0][0] - means[0][1]) / left if left > 0 else 0.0
        spread = np.mean([layer["entropy_by_difficulty"] for layer in layers], axis=0)
        cells = [entry["arm"], str(entry["seed"]), f"{left:.3f}", told, f"{share:.1%}"]
        rows.append([*cells, pure, apart, " ".join(f"{v:.2f}" for v in spread)])
    head = "arm,seed,H(tile given token) nats,I(tile; previous given token) nats"
    head += ",of what is left,purity,use distance,entropy by difficulty"
    return table(head.split(","), rows)


def difficulty(entries: list[Entry]) -> str:
    """Loss of the reference and of every run in the four quarters."""
    lines = [("the reference", "", entries[0]["reference_by_difficulty"])]
    lines += [(e["arm"], str(e["seed"]), e["loss_by_difficulty"]) for e in entries]
    rows = [[arm, seed, *(f"{v:.3f}" for v in losses)] for arm, seed, losses in lines]
    return table(["arm", "seed", "easiest", "second", "third", "hardest"], rows)


def gaps(entries: list[Entry]) -> str:
    """Validation less training loss, and ternary less float weights paired by seed."""
    by_arm: dict[str, dict[int, float]] = defaultdict(dict)
    for entry in entries:
        by_arm[entry["arm"]][entry["seed"]] = entry["gap"]
    rows = [
        [arm, str(len(gap)), f"{np.mean(list(gap.values())):.4f}"]
        for arm, gap in by_arm.items()
    ]
    text = table(["arm", "seeds", "validation - training loss"], rows)
    for arm in by_arm:
        found = paired(by_arm[arm], by_arm.get(f"{arm}-float", {}))
        if found:
            bound = f" ± {found.half:.4f}" if found.n > 1 else ""
            text += f"\nGap of {arm}, ternary less float weights: {found.mean:+.4f}{bound} ({found.n} seeds).\n"
    return text


def _entries(path: Path) -> list[Entry]:
    return read_json(path) if path.exists() else []


def _counts(*labels: Ids) -> np.ndarray:
    """How often each token's combination of labels occurs, a number a token."""
    code = np.zeros(len(labels[0]), np.int64)
    for label in labels:
        code = code * (int(label.max()) + 1) + label
    _, inverse, counts = np.unique(code, return_inverse=True, return_counts=True)
    return counts[inverse].astype(np.float64)


def _use(tiles: Ids, part: Ids, num_tiles: int) -> np.ndarray:
    counts = np.zeros((part.max() + 1, num_tiles))
    np.add.at(counts, (part, tiles), 1)
    return counts / counts.sum(axis=1, keepdims=True)


if __name__ == "__main__":
    main()
