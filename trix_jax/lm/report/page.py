"""Markdown that the pages share: tables, code of any text, what a run was made with.

Pages hold relative links and no path of the machine; the same inputs give the same
text.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trix_jax.files import write_whole
from trix_jax.lm.config import RunConfig


def describe_ffn(config: RunConfig) -> str:
    """What the FFNs of a run are, for a sentence."""
    model = config.model
    if model.ffn == "dense":
        return f"dense FFNs of width {model.dense_width}"
    used = f"{model.tiles_per_token} used by each token"
    used += ", by a hash of its id" if model.routing.source == "hash" else ""
    used += ", another in every layer" if model.hash_per_layer else ""
    if s := model.routing.hash_sets:
        used += f", those of {model.routing.sets_per_token} of {s} sets"
    used += f", and a real FFN of {model.shared_width}" if model.shared_width else ""
    return f"{model.ffn} FFNs of {model.num_tiles} tiles, {used}"


def made_with(env: Mapping[str, Any]) -> str:
    """Versions, devices and commit of a run, as a sentence."""
    devices = [f"{env['devices'].count(d)} x {d}" for d in sorted({*env["devices"]})]
    packages = ", ".join(f"{name} {v}" for name, v in sorted(env["packages"].items()))
    commit = f"; commit {env['git_commit']}" if env["git_commit"] else ""
    return (
        f"Python {env['python']} on {env['system']}, {env['cpu_count']} CPUs, devices "
        f"{', '.join(devices)}; {packages}{commit}."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all columns but the first to the right."""
    lines = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(workdir: Path, parts: Sequence[str]) -> Path:
    """Writes `workdir/REPORT.md`, a blank line between its parts; returns its path."""
    path = workdir / "REPORT.md"
    write_whole(path, "\n\n".join(parts) + "\n")
    return path


def code(text: str) -> str:
    """Inline code of any text, its line breaks escaped."""
    text = text.replace("\n", "\\n")
    ticks = _ticks(text, 1)
    pad = " " if "`" in text or text[:1] == text[-1:] == " " or not text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def fence(prompt: str, sample: str) -> str:
    """A fenced block of the sample, prompt first, whatever characters it has."""
    whole = sample if sample.startswith(prompt) else prompt + sample
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in whole)
    ticks = _ticks(text, 3)
    return f"{ticks}text\n{text.rstrip()}\n{ticks}"


def _ticks(text: str, least: int) -> str:
    """More backticks than any run of them in the text."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
