"""`trix-jax prepare --workdir DIR`."""

import dataclasses

from trix_jax.cli.common import parse, print_json, say
from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.signals import Signals


@dataclasses.dataclass(frozen=True)
class Args:
    """Turn text into a tokenizer and a verified token store."""

    workdir: str
    """Where the store goes."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Prepares a store and prints its fingerprint."""
    args = parse(Args, argv, "prepare")
    report = say(args.json)
    state = f"before {args.workdir} was complete; nothing was written there"
    with Signals() as signals, signals.at_once(state):
        store = prepare(args.data, args.workdir, report)
    report(f"{args.workdir}: fingerprint {store.fingerprint}")
    if args.json:
        print_json(
            {
                "workdir": args.workdir,
                "fingerprint": store.fingerprint,
                "vocab_size": store.tokenizer.vocab_size,
                "train_tokens": len(store.train),
                "val_tokens": store.val_tokens,
            }
        )
