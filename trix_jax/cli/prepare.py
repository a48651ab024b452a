"""`trix-jax prepare [NAME] --workdir DIR`."""

import dataclasses

from trix_jax.cli.common import print_json, say
from trix_jax.lm.data import DataConfig, check_typed, prepare
from trix_jax.lm.data.datasets import DATASETS
from trix_jax.lm.presets import parse
from trix_jax.lm.signals import Signals


@dataclasses.dataclass(frozen=True)
class Args:
    """Turn text into a tokenizer and a verified token store. The name of a data set
    before the flags (fineweb_5m, fineweb_50m, fineweb_500m, fineweb_10b, stack_250m)
    sets them as the experiments want them.
    """

    workdir: str
    """Where the store goes."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rebuild: bool = False
    """Make the store again, from what the text is now."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Prepares a store and prints its fingerprint."""
    name, flags = (
        (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    )
    args = parse(Args, flags, "prepare", _named(name) if name else None)
    check_typed(args.data, flags)
    report = say(args.json)
    state = f"before {args.workdir} was complete; nothing was written there"
    with Signals() as signals, signals.at_once(state):
        changed = "rebuild" if args.rebuild else "refuse"
        store = prepare(args.data, args.workdir, report, changed=changed)
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


def _named(name: str) -> Args:
    if name not in DATASETS:
        raise ValueError(
            f"the data set must be one of {', '.join(DATASETS)}. Got {name!r}."
        )
    dataset = DATASETS[name]
    data = DataConfig(
        source=name,  # pyrefly: ignore[bad-argument-type]  a key of DATASETS
        tokenizer="bpe",
        vocab_size=dataset.vocab_size,
        val_fraction=dataset.val_fraction,
    )
    return Args(workdir=f"data/{name}", data=data)
