"""A preset, an arm of it and flags, into a `RunConfig`.

A preset is YAML with the sections `model`, `data`, `train` and, under `arms`, named
overrides such as `dense: {model.ffn: dense, model.ffn_width: match-params}`. An arm
that says `like: lookup` starts from that other arm. A file becomes flags, and all flags go through one parser at once, so that a file's mistakes
get the messages of the command line and only the outcome has to make sense.
"""

import dataclasses
from pathlib import Path
from typing import Any

from trix_jax.lm.accounting import MATCHES
from trix_jax.lm.config import BASE_ARM, DEFAULT_ARM, RunConfig, read_yaml
from trix_jax.nn.transformer import TransformerConfig


def to_flags(tree: dict[Any, Any], prefix: str = "") -> list[str]:
    """Turns nested or dotted YAML into command-line flags: `{model: {d_model: 256}}` to
    `--model.d-model 256`.

    Raises:
        ValueError: a value that no flag can hold.
    """
    flags = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flags += to_flags(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, last = name.rpartition(".")
            dotted = f"{head}." if head else ""
            flags.append(f"--{dotted}{'' if value else 'no-'}{last}".replace("_", "-"))
        elif value is None or isinstance(value, str | int | float):
            flags += [f"--{name}".replace("_", "-"), str(value)]
        else:
            raise ValueError(f"{name} must be a single value. Got {value!r}.")
    return flags


def _check_once(path: str | Path, tree: dict[Any, Any]) -> None:
    """Raises a ValueError for a setting under two spellings, of which the first would be
    lost: `learning_rate` and `learning-rate`, nested and dotted.
    """
    try:
        flat(tree)
    except ValueError as error:
        raise ValueError(f"config {path} {error}") from None


def flat(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested or dotted settings by their names as flags spell them, such as
    `model.d-model`, so that one mapping can go over another.

    Raises:
        ValueError: one in two spellings.
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}".replace("_", "-")
        own = flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
        if twice := sorted(found.keys() & own):
            raise ValueError(
                f"must give {twice[0]} once. It is there in two spellings."
            )
        found |= own
    return found


def preset_flags(path: str | Path, arm: str) -> tuple[list[str], list[str]]:
    """The flags that an arm starts from, and those that it adds.

    It starts from the preset, or with `like` from another arm of the preset.

    Raises:
        ValueError: the preset has no such arm, an arm is no such thing, or `arm` is set
            in a preset that has arms.
    """
    tree = read_yaml(path)
    arms = tree.pop("arms", None) or {}
    if not isinstance(arms, dict):
        raise ValueError(
            f"arms in {path} must map names to overrides. Got {type(arms).__name__}."
        )
    if arm not in (BASE_ARM, *arms):
        raise ValueError(
            f"arm must be one of {', '.join([*sorted(arms), BASE_ARM])}. Got {arm!r}."
        )
    _check_labels(path, tree, arms)
    overrides = _overrides(path, arms, arm)
    like = overrides.pop("like", None)
    for given in (tree, *(each for each in arms.values() if isinstance(each, dict))):
        _check_once(path, given)
    start = to_flags(tree)
    if like is not None:
        first = _overrides(path, arms, like) if isinstance(like, str) else {}
        if like not in list(arms) or "like" in first:
            raise ValueError(
                f"arms.{arm}.like in {path} must name an arm without a like of its own. "
                f"Got {like!r}."
            )
        start += to_flags(first)
    return start, to_flags(overrides)


def _check_labels(path: str | Path, tree: dict[str, Any], arms: dict[str, Any]) -> None:
    """Raises a ValueError for `arm` inside a preset that has arms: it would be a label that
    changes no setting.
    """
    named = [
        name for name, one in arms.items() if isinstance(one, dict) and "arm" in one
    ]
    if named:
        raise ValueError(
            f"arms.{named[0]} in {path} must name the arm that it starts from with like. "
            f"Got arm: {arms[named[0]]['arm']}."
        )
    if arms and "arm" in tree:
        raise ValueError(
            f"{path} has arms, of which --arm chooses one; arm must not be set beside "
            f"them. Got {tree['arm']!r}."
        )


def _overrides(path: str | Path, arms: dict[str, Any], arm: str) -> dict[str, Any]:
    overrides = arms.get(arm) or {}
    if not isinstance(overrides, dict):
        raise ValueError(
            f"arms.{arm} in {path} must map settings to values. Got {overrides!r}."
        )
    return dict(overrides)


def parse(kind: Any, argv: list[str], verb: str, default: Any = None) -> Any:
    """Parses flags into a dataclass; a mistake prints what is wrong, with the nearest
    name, and exits with 2.
    """
    import tyro

    extra = {} if default is None else {"default": default}
    return tyro.cli(kind, args=argv, prog=f"trix-jax {verb}", **extra)


def parse_preset(
    kind: Any, argv: list[str], verb: str, start: RunConfig | None = None
) -> Any:
    """Parses `[CONFIG.yaml] --flags` into a dataclass with a field `config: RunConfig`.

    The preset comes first, then its `--arm` (without it the preset is taken as it
    stands), then the flags; each may override what came before. A dense width to be
    matched ("match-params") becomes a number: that of what the arm starts from, with
    the flags of its model.

    Args:
        start: whose model and arm are taken where neither preset nor flags say otherwise;
            None: the defaults.
    """
    begun = start or RunConfig(arm=DEFAULT_ARM)
    path, flags = (
        (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    )
    typed = value_of("--arm", flags)
    arm = typed or (BASE_ARM if path else begun.arm)
    base, own = preset_flags(path, arm) if path else ([], [])
    default = kind(config=RunConfig(arm=arm, model=begun.model))
    args = parse(kind, [*base, *own, *flags], verb, default)
    if not (path or typed or start):  # a name for what the flags make
        own_name = dataclasses.replace(args.config, arm=args.config.model.ffn)
        args = dataclasses.replace(args, config=own_name)
    model = args.config.model
    if not isinstance(model.ffn_width, str):
        return args
    compared = [part for flag in _pairs(flags) if _is_shape(flag[0]) for part in flag]
    reference = parse(RunConfig, [*base, *compared], verb).model
    return _with_model(args, match_width(model, reference))


def _is_shape(flag: str) -> bool:
    """Whether a flag also holds for the model that a dense width is matched with."""
    name = flag.partition("=")[0]
    return flag.startswith("--model.") and name not in (
        "--model.ffn",
        "--model.ffn-width",
    )


def match_width(
    model: TransformerConfig, reference: TransformerConfig
) -> TransformerConfig:
    """A dense model whose `ffn_width` ("match-params", "match-active", "match-bits") is
    the width at which it costs what the reference costs; another model as it is.

    Raises:
        ValueError: see `match_bits`.
    """
    match = MATCHES.get(str(model.ffn_width))
    if match is None:
        return model
    target = dataclasses.replace(reference, ffn_width=None, vocab_size=model.vocab_size)
    width = match(model, target)
    return dataclasses.replace(model, ffn_width=width)


def _with_model(args: Any, model: TransformerConfig) -> Any:
    config = dataclasses.replace(args.config, model=model)
    return dataclasses.replace(args, config=config)


def value_of(name: str, flags: list[str]) -> str | None:
    """What a flag is given last, before the flags are parsed; None if it is not there."""
    found = None
    for i, flag in enumerate(flags):
        if flag.startswith(f"{name}="):
            found = flag.partition("=")[2]
        elif flag == name and i + 1 < len(flags):
            found = flags[i + 1]
    return found


def _pairs(flags: list[str]) -> list[list[str]]:
    """Flags with the values that follow them."""
    pairs: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--") or not pairs:
            pairs.append([flag])
        else:
            pairs[-1].append(flag)
    return pairs
