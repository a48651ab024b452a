"""The original's TinyShakespeare figures, by its own protocol: a footnote.

    python -m experiments.quality.protocol --data input.txt --runs DIR

It trains on the first 50,000 windows of 128 characters (stride 1, so 50,128 characters)
and evaluates on the first 3,200 such windows of the last tenth of the text. One seed,
two epochs of its ten; an n-gram floor on the same characters beside them. Resumes, and
skips an arm that is in results/original-protocol.json.

References:
    https://github.com/anjaustin/trix, scripts/benchmark_ffn.py.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax

from experiments.quality.run import RESULTS
from trix_jax.cli.main import INTERRUPTED
from trix_jax.cli.train import Args
from trix_jax.files import write_whole
from trix_jax.lm.data import Split, open_store
from trix_jax.lm.ngram import ngram_losses
from trix_jax.lm.presets import parse_preset
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.signals import Interrupted
from trix_jax.lm.train.loop import train

PRESET = Path(__file__).parent / "original_protocol.yaml"
TRAIN_WINDOWS, VAL_WINDOWS, CONTEXT = 50_000, 3_200, 128
ARMS = {"sparse-4": 19.26, "hierarchical": 16.67}  # what the original and the seed say
SEED = 42


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when all arms are done, 75 when interrupted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="input.txt")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder")
    parser.add_argument("--flags", default="", help="a shrunken copy, to try this out")
    args = parser.parse_args(argv)
    out = args.results / "original-protocol.json"
    done = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
    folder = args.runs / "original-protocol"
    folder.mkdir(parents=True, exist_ok=True)
    text = characters(args.data.read_text(encoding="utf-8"))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    for arm in ARMS:
        if arm not in {run["arm"] for run in done}:
            try:
                done.append(run(arm, folder, len(text), args.flags))
            except Interrupted as stop:
                print(stop, flush=True)
                return INTERRUPTED
            write_whole(out, json.dumps(done, indent=1) + "\n")
            print(done[-1], flush=True)
    return 0


def characters(text: str) -> str:
    """What the original trains on, and then what it evaluates on."""
    val = int(len(text) * 0.9)
    return text[: TRAIN_WINDOWS + CONTEXT] + text[val : val + VAL_WINDOWS + CONTEXT]


def run(arm: str, folder: Path, size: int, more: str) -> dict:
    """One arm, and its perplexities after each epoch."""
    val_fraction = (VAL_WINDOWS + CONTEXT - 0.5) / size  # the cut rounds down
    flags = f"--arm {arm} --seed {SEED} --data.path {folder / 'text.txt'}"
    flags += f" --data.val-fraction {val_fraction} {more}"
    args = parse_preset(Args, [str(PRESET), *shlex.split(flags)], "train")
    workdir = folder / arm
    summary = train(
        args.config,
        workdir,
        devices=jax.devices()[:1],
        report=lambda _: None,
    )
    store = open_store(workdir / "data")
    steps = (args.config.train.eval_every, summary["steps"])
    perplexities = [perplexity(workdir, step, store.val) for step in steps]
    lines = (store.train, store.val)
    tokens, val = (split.window(0, len(split)) for split in lines)
    bigram = ngram_losses(tokens, val, (2,), store.tokenizer.vocab_size)[2]
    return {
        "setting": "original-protocol",
        "arm": arm,
        "seed": SEED,
        "steps": summary["steps"],
        "best_ppl": min(perplexities),
        "final_ppl": perplexities[-1],
        "original_ppl": ARMS[arm],
        "bigram_ppl": math.exp(bigram),
        "seconds": round(summary["seconds"], 1),
        "git_commit": summary["git_commit"],
    }


def perplexity(workdir: Path, step: int, split: Split, batch_size: int = 64) -> float:
    """Computes `exp(mean loss)` over all windows of the split, one starting at every
    character.
    """
    model, variables, _ = load_run(workdir, step)
    line = split.window(0, len(split))
    length = model.config.context + 1
    windows = np.lib.stride_tricks.sliding_window_view(line, length)
    windows = windows[: len(windows) // batch_size * batch_size]

    @jax.jit
    def loss(batch):
        logits = model.apply(variables, batch[:, :-1])[0]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch[:, 1:]
        ).mean()

    batches = windows.reshape(-1, batch_size, length)
    return math.exp(np.mean([float(loss(batch)) for batch in batches]))


if __name__ == "__main__":
    sys.exit(main())
