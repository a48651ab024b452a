"""What a checkpoint belongs to: the settings, the tokenizer and the data that its
numbers mean something with.

A checkpoint's own files are under its manifest; those beside it, `config.yaml` and
`tokenizer.json`, are not, and one changed letter of either gives other numbers or other
text. So every checkpoint notes what it was trained with.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from trix_jax.files import file_sha256
from trix_jax.lm.config import (
    ROUTER_INPUT_BEFORE,
    SAMPLER_BEFORE,
    RunConfig,
    fingerprint,
    to_tree,
)
from trix_jax.lm.data import Store
from trix_jax.lm.train.extend import is_part_of

DATA = "data."  # how a store was made; its fingerprint says whether it is the same
# How a run is looked at, which may change while it trains: no step depends on it.
WATCHING = {
    f"train.{name}"
    for name in (
        "log_every eval_every eval_epochs eval_batch_size eval_tokens checkpoint_every "
        "max_skipped"
    ).split()
}


def notes(config: RunConfig, store: Store) -> dict[str, Any]:
    """What `check` compares, for the `meta` of a checkpoint."""
    return {
        "data_fingerprint": store.fingerprint,
        "config_sha256": fingerprint(config),
        "settings": flat(to_tree(config)),
        "tokenizer_sha256": store.manifest["files"]["tokenizer.json"]["sha256"],
    }


def check(
    meta: dict[str, Any], config: RunConfig, tokenizer: Path, step: int, what: str
) -> None:
    """Compares what a checkpoint was trained with to what lies beside it.

    Settings that only one side knows are of another version of this program, and pass;
    so do notes that an older one did not write. A step of a shorter run that was
    extended since is one of the longer run too, up to where that changes nothing.

    Raises:
        ValueError: another setting or tokenizer; names them.
    """
    before, now = meta.get("settings", {}), flat(to_tree(config))
    if before:
        before = {"train.sampler": SAMPLER_BEFORE} | before
        if before.get("model.ffn") != "dense":
            before = {"model.router_input": ROUTER_INPUT_BEFORE} | before
        if before.get("model.ffn") == "lookup" and "model.reads" not in before:
            before["model.top_k_clusters"] = 1  # whatever was written, see `from_tree`
        steps = before.get("train.steps", config.train.steps)
        if is_part_of(step, steps, config):
            before["train.steps"] = config.train.steps
        before = {n: v for n, v in before.items() if n not in WATCHING}
    if lines := changes(before, now):
        raise ValueError(f"{what} was trained with other settings: {'; '.join(lines)}.")
    wanted = meta.get("tokenizer_sha256")
    if wanted and file_sha256(tokenizer) != wanted:
        raise ValueError(
            f"{tokenizer} must be the tokenizer that {what} was trained with: "
            f"its sha256 must be {wanted}."
        )


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ, of those that both have, but for those of the data."""
    both = sorted(n for n in before.keys() & now.keys() if not n.startswith(DATA))
    return [
        f"{name} was {before[name]!r} and is {now[name]!r}"
        for name in both
        if before[name] != now[name]
    ]


def check_settings(
    workdir: Path, before: RunConfig, now: RunConfig, free: Collection[str] = ()
) -> None:
    """Raises a ValueError that names the settings unless a run that is there has those
    that are asked for.

    Args:
        free: settings that may differ.
    """
    trees = (flat(to_tree(config)) for config in (before, now))
    kept = ({n: v for n, v in tree.items() if n not in free} for tree in trees)
    if lines := changes(*kept):
        raise ValueError(
            f"{workdir} holds a run with other settings: {'; '.join(lines)}. Use "
            "another workdir, or the same settings."
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config with dotted names."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, dict)
        values |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return values


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *parents, last = name.split(".")
        here = tree
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return tree
