"""What counting alone reaches on a setting's own split: losses of n-gram models.

    trix-jax prepare FLAGS --workdir STORE   # the data of a setting
    python -m experiments.floors SETTING STORE

adds SETTING to `experiments/quality/results/ngram-floors.json`. FLAGS are noted with it.
"""

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from trix_jax.lm.data import open_store
from trix_jax.lm.ngram import floors

PATH = Path(__file__).parent / "quality" / "results" / "ngram-floors.json"
ENGLISH = (
    "--data.source parquet --data.path FOLDER --data.tokenizer bpe "
    "--data.vocab-size 2048 --data.val-fraction 0.015 --data.near-duplicates 0.8"
)
SHAKESPEARE = "--data.source text --data.path input.txt --data.tokenizer char"
FLAGS = {"english-256-muon": ENGLISH, "shakespeare-char-muon": SHAKESPEARE}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setting", choices=sorted(FLAGS))
    parser.add_argument("store")
    args = parser.parse_args(argv)
    store = open_store(args.store)
    losses = floors(store)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    known = json.loads(PATH.read_text("utf-8")) if PATH.exists() else {}
    known[args.setting] = {
        "val_loss": {str(order): loss for order, loss in losses.items()},
        "train_tokens": len(store.train),
        "val_tokens": len(store.val),
        "store_fingerprint": store.fingerprint,
        "command": f"trix-jax prepare {FLAGS[args.setting]} --workdir STORE && "
        f"python -m experiments.floors {args.setting} STORE",
        "git_commit": commit,
    }
    PATH.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
