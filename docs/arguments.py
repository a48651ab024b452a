"""Writes the table of arguments in `layers.md`: `python docs/arguments.py`.

Names and defaults are the layers' own, meanings those of their docstrings and, for what
the layers share, of `TileSettings`. A test compares the page with it.
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

from trix_jax import HierarchicalTriXFFN, SparseLookupFFN, SparseTriXFFN
from trix_jax.nn import TileSettings

PAGE = Path(__file__).with_name("layers.md")
LAYERS = (SparseTriXFFN, HierarchicalTriXFFN, SparseLookupFFN)
START, END = (
    "<!-- python docs/arguments.py writes this table -->\n\n",
    "\n\n<!-- end -->",
)
NOT_TAKEN = "–"


def meanings(cls: type) -> dict[str, str]:
    """The entries of a docstring's Attributes, each as one line."""
    section = re.search(
        r"^Attributes:\n((?: {4}.*\n)+)", f"{inspect.getdoc(cls)}\n", flags=re.M
    )
    assert section, f"{cls.__name__} documents no attributes"
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1], flags=re.M)
    return {name: re.sub(r"\s+", " ", meaning) for name, meaning in entries}


def defaults(cls: type) -> dict[str, str]:
    """The arguments of a layer and how their defaults are written."""
    return {
        field.name: shown(field.default)
        for field in dataclasses.fields(cls)
        if field.name not in ("parent", "name")
    }


def shown(default: Any) -> str:
    if default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(default):
        return f"`{type(default).__name__}()`"
    text = getattr(default, "__name__", None) or repr(default)
    return "`{}`".format(text.replace("'", '"'))


def table() -> str:
    """The arguments of all layers: each one's own first, then the shared ones."""
    taken = [defaults(layer) for layer in LAYERS]
    shared = meanings(TileSettings)
    own = {
        name: meaning
        for layer in LAYERS
        for name, meaning in meanings(layer).items()
        if name not in shared
    }
    heads = ["argument", *(f"`{layer.__name__}`" for layer in LAYERS), "meaning"]
    rows = [heads, ["---"] * len(heads)]
    for name in [*own, *(field.name for field in dataclasses.fields(TileSettings))]:
        cells = [arguments.get(name, NOT_TAKEN) for arguments in taken]
        rows.append([f"`{name}`", *cells, {**own, **shared}[name]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(page: str) -> str:
    """The page with the table as it should be."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return before + START + table() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text("utf-8")), "utf-8")
