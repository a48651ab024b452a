"""What the verbs share: parsing presets and flags, the JSON line, interruption."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import Any


def parse(kind: Any, argv: list[str], verb: str, default: Any = None) -> Any:
    """Parses flags into a dataclass; a mistake prints what is wrong, with the nearest
    name, and exits with 2.
    """
    import tyro

    extra = {} if default is None else {"default": default}
    return tyro.cli(kind, args=argv, prog=f"trix-jax {verb}", **extra)


def parse_preset(kind: Any, argv: list[str], verb: str) -> tuple[Any, Any]:
    """Parses `[CONFIG.yaml] --flags` into a dataclass with a field `config: RunConfig`.

    The preset is read first, then its `--arm`, then the flags; each may override what
    came before. Without `--arm` it is the preset as it stands.

    Returns:
        the arguments, and the model that a dense width to be matched ("match-params")
        refers to: that of the flags and of what the arm starts from. Without such a
        width it is the arguments' own model.
    """
    from trix_jax.lm.config import BASE_ARM, DEFAULT_ARM, RunConfig, preset_flags

    path, flags = (
        (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    )
    arm = _value_of("--arm", flags) or (BASE_ARM if path else DEFAULT_ARM)
    start = RunConfig(arm=arm)
    base_flags, arm_flags = preset_flags(path, arm) if path else ([], [])
    base = parse(RunConfig, base_flags, verb, start)
    config = parse(RunConfig, arm_flags, verb, base)
    args = parse(kind, flags, verb, kind(config=config))
    args = dataclasses.replace(args, config=dataclasses.replace(args.config, arm=arm))
    if not isinstance(args.config.model.ffn_width, str):
        # Flags may suit the arm alone: more tiles a token than a cluster of the preset.
        return args, args.config.model
    own = [
        flag
        for flag in _pairs(flags)
        if flag[0].startswith("--model.")
        and flag[0] not in ("--model.ffn", "--model.ffn-width")
    ]
    reference = parse(
        RunConfig, [part for flag in own for part in flag], verb, base
    ).model
    return args, reference


def say(as_json: bool) -> Callable[[str], None]:
    """Where messages go: standard output, or standard error where standard output ends
    in JSON.
    """
    stream = sys.stderr if as_json else sys.stdout
    return lambda text: print(text, file=stream, flush=True)


def print_json(values: dict[str, Any]) -> None:
    """The one JSON object that ends a verb's standard output under `--json`."""
    print(json.dumps(values), flush=True)


def be_deterministic() -> None:
    """Asks XLA for deterministic GPU kernels; on CPU they are so anyway. Must run
    before JAX starts a backend.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def _value_of(name: str, flags: list[str]) -> str | None:
    for i, flag in enumerate(flags):
        if flag.startswith(f"{name}="):
            return flag.partition("=")[2]
        if flag == name and i + 1 < len(flags):
            return flags[i + 1]
    return None


def _pairs(flags: list[str]) -> list[list[str]]:
    """Flags with the values that follow them."""
    pairs: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--") or not pairs:
            pairs.append([flag])
        else:
            pairs[-1].append(flag)
    return pairs
