"""`trix-jax prepare [NAME | CONFIG.yaml] --workdir DIR`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from trix_jax.cli.common import print_json, say
from trix_jax.lm.config import RunConfig
from trix_jax.lm.data import DataConfig, check_typed, prepare
from trix_jax.lm.data.datasets import DATASETS
from trix_jax.lm.presets import parse, parse_preset
from trix_jax.lm.signals import Signals


@dataclasses.dataclass(frozen=True)
class Args:
    """Turn text into a tokenizer and a verified token store. The name of a data set
    before the flags (fineweb_5m, fineweb_50m, fineweb_500m, fineweb_10b, stack_250m)
    sets them as the experiments want them; a preset there, as for `train`, as it has
    them.
    """

    workdir: str
    """Where the store goes."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    rebuild: bool = False
    """Make the store again, from what the text is now."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


@dataclasses.dataclass(frozen=True)
class PresetArgs:
    """Turn the text of a preset into what `train` with that preset reads."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    workdir: str = ""
    """Where the store goes; by default data/ and the preset's name."""
    rebuild: bool = False
    """Make the store again, from what the text is now."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> None:
    """Prepares a store and prints its fingerprint."""
    args, data, context = _parse(argv)
    check_typed(data, argv)
    report = say(args.json)
    state = f"before {args.workdir} was complete; nothing was written there"
    with Signals() as signals, signals.at_once(state):
        changed = "rebuild" if args.rebuild else "refuse"
        store = prepare(data, args.workdir, report, context, changed)
    report(f"{store.directory}: fingerprint {store.fingerprint}")
    if args.json:
        print_json(
            {
                "workdir": str(store.directory),
                "fingerprint": store.fingerprint,
                "vocab_size": store.tokenizer.vocab_size,
                "train_tokens": len(store.train),
                "val_tokens": store.val_tokens,
            }
        )


def _parse(argv: list[str]) -> tuple[Args | PresetArgs, DataConfig, int]:
    """The flags, the data they name, and the context that it must have windows of."""
    name = argv[0] if argv and not argv[0].startswith("-") else None
    if name is None or name in DATASETS:
        flags, default = (argv[1:], _named(name)) if name else (argv, None)
        args = parse(Args, flags, "prepare", default)
        return args, args.data, 1
    if not name.endswith((".yaml", ".yml")) and not Path(name).is_file():
        raise ValueError(
            f"what to prepare must be one of {', '.join(DATASETS)}, or a preset, a "
            f".yaml file. Got {name!r}."
        )
    preset = parse_preset(PresetArgs, argv, "prepare")
    place = preset.workdir or f"data/{Path(name).stem}"
    preset = dataclasses.replace(preset, workdir=place)
    return preset, preset.config.data, preset.config.model.context


def _named(name: str) -> Args:
    dataset = DATASETS[name]
    data = DataConfig(
        source=name,  # pyrefly: ignore[bad-argument-type]  a key of DATASETS
        tokenizer="bpe",
        vocab_size=dataset.vocab_size,
        val_fraction=dataset.val_fraction,
    )
    return Args(workdir=f"data/{name}", data=data)
