"""The flags of every verb, so that a mistyped one is named without importing JAX.

`flags.json` is made from the verbs' own dataclasses, by
`python -c "from trix_jax.cli import flags; flags.write()"`; a test compares the two. Values are the parser's to check.
"""

import difflib
import importlib
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("flags.json")
ANY_VERB = "--no-compilation-cache"  # `trix_jax.cli.compilations` takes it
KINDS = ("Args", "PresetArgs")  # what verbs call the dataclasses that they parse
NAME = re.compile(r"--[A-Za-z][\w.-]*")
NEAR = 3  # names suggested at most


def mistake(verb: str, argv: list[str]) -> str | None:
    """What to say of the first flag that a verb does not have; None if it has them all.

    A flag is two dashes and a name, up to an equals sign and before a bare `--`; like
    the parser this takes underscores for dashes.
    """
    known = {*json.loads(FILE.read_text("utf-8"))[verb], ANY_VERB}
    before = itertools.takewhile(lambda arg: arg != "--", argv)
    for flag in (arg.partition("=")[0] for arg in before):
        if NAME.fullmatch(flag) and flag.replace("_", "-") not in known:
            near = difflib.get_close_matches(flag, sorted(known), NEAR)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            return f"{flag} is no flag of this verb.{hint} `trix-jax {verb} --help` lists them."
    return None


def collect() -> dict[str, list[str]]:
    """The flags of every verb, from the dataclasses that they parse."""
    from trix_jax.cli.main import VERBS

    return {verb: sorted(_flags_of(verb)) for verb in VERBS}


def write() -> None:
    """Makes `flags.json` anew."""
    FILE.write_text(json.dumps(collect(), indent=1) + "\n", "utf-8")


def _flags_of(verb: str) -> set[str]:
    module = importlib.import_module(f"trix_jax.cli.{verb}")
    kinds = [kind for name, kind in vars(module).items() if name in KINDS]
    return {option for kind in kinds for option in _options(kind)}


def _options(kind: Any) -> set[str]:
    """The options with two dashes of a dataclass's parser."""
    import tyro

    from trix_jax.lm.config import RunConfig

    takes_preset = "config" in kind.__dataclass_fields__
    default = {"default": kind(config=RunConfig())} if takes_preset else {}
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        parser = tyro.extras.get_parser(kind, **default)
    return {
        option
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
