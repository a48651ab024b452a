"""One self-contained HTML file from what `look` found: no network, nothing to install."""

import html
import json
from importlib import resources
from pathlib import Path
from typing import Any


def write_page(found: dict[str, Any], path: str | Path) -> Path:
    """Writes the page; its style, script and numbers are all inside."""
    path = Path(path)
    parts = {name: _asset(name) for name in ("page.css", "page.js")}
    # "</" would end the script element that holds the numbers.
    data = json.dumps(found, separators=(",", ":"), allow_nan=False).replace(
        "</", "<\\/"
    )
    page = _asset("page.html")
    for mark, text in (
        ("{{title}}", html.escape(found["name"])),
        ("/*{{style}}*/", parts["page.css"]),
        ("/*{{script}}*/", parts["page.js"]),
        ("{{data}}", data),
    ):
        page = page.replace(mark, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")
