"""What routing does in trained runs, measured on their validation split.

    python -m experiments.quality.measure RUN... --reference DENSE_RUN --data STORE

A RUN is a run directory of `run.py`. What it finds is added to results/doing.json, which
`report.py` reads. Difficulty is the loss of the dense run of --reference on the token;
the train-validation gap compares losses on equally many tokens of both splits.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.quality import doing, results
from trix_jax.lm.data import Split, Store, eval_batches
from trix_jax.lm.serve.load import load_run, open_run_data, read_config
from trix_jax.nn.transformer import TransformerLM

DOING = Path(__file__).parent / "results" / "doing.json"
BINS = 4


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
    hard = observe_run(args.reference, store.val).losses
    for run in args.runs:
        found = measure(run, store, hard)
        results.add(args.out, found)
        print(
            f"{found['arm']} seed {found['seed']}: gap {found['gap']:.4f}", flush=True
        )


def measure(run: Path, store: Store, hard: np.ndarray) -> dict[str, Any]:
    """One run's entry of doing.json."""
    config = read_config(run)
    val = observe_run(run, store.val)
    train = observe_run(run, store.train, len(store.val))
    part = doing.bins_of(hard, BINS)
    texts = [store.tokenizer.decode([i]) for i in range(store.tokenizer.vocab_size)]
    classes = np.array([doing.class_of(text) for text in texts])[val.tokens]
    before = np.concatenate([val.tokens[:1], val.tokens[:-1]])
    layers = [
        of_layer(tiles, val.tokens, before, classes, part, config.model.num_tiles)
        for tiles in val.tiles
    ]
    name = run.name.rpartition("-lr")[0]
    return {
        "arm": name or run.name,
        "seed": config.seed,
        "learning_rate": config.train.learning_rate,
        "tokens": len(val.tokens),
        "val_loss": float(val.losses.mean()),
        "train_loss": float(train.losses.mean()),
        "gap": float(val.losses.mean() - train.losses.mean()),
        "loss_by_difficulty": doing.mean_by_bin(val.losses, part),
        "reference_by_difficulty": doing.mean_by_bin(hard, part),
        "layers": layers,
    }


def of_layer(tiles, tokens, before, classes, part, num_tiles: int) -> dict[str, Any]:
    """The measures of one layer; a triple is value, chance, spread of chance."""
    return {
        "entropy_given_token": doing.conditional_entropy(tiles, tokens),
        "information": list(doing.information_measured(tiles, before, tokens)),
        "purity": list(doing.purity_measured(tiles, classes)),
        "use_distance": list(doing.use_distance_measured(tiles, part, num_tiles)),
        "entropy_by_difficulty": doing.entropy_by_bin(tiles, part, num_tiles),
    }


def observe_run(run: Path, split: Split, tokens: int | None = None) -> Observed:
    """A run's newest checkpoint on the first `tokens` of a split, None all."""
    model, variables, _ = load_run(run)
    return observe(model, variables, split, tokens)


def observe(
    model: TransformerLM, variables: Any, split: Split, limit: int | None = None
) -> Observed:
    """Runs the model over the windows that evaluation takes."""
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
    tokens, losses, tiles = zip(*seen, strict=True)
    return Observed(
        np.concatenate(tokens)[:limit],
        np.concatenate(losses)[:limit],
        np.concatenate(tiles, axis=1)[:, :limit],
    )


def _step(model, variables, batch):
    logits, infos, _ = model.apply(variables, batch[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    tiles = [info.tiles[..., 0].reshape(-1) for info in infos if info is not None]
    size = losses.size
    return losses, jnp.stack(tiles) if tiles else jnp.zeros((0, size), jnp.int32)


if __name__ == "__main__":
    main()
