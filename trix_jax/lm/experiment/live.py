"""What an experiment says to people while it goes: one live table, or plain lines."""

import time
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

SECONDS_BETWEEN_LINES = 60.0
COLOURS = {
    "running": "cyan",
    "done": "green",
    "diverged": "magenta",
    "failed": "red",
    "stopped": "yellow",
}


class Table:
    """Shows the rows of `trix_jax.lm.experiment.runner.run_all`."""

    def __init__(self, stream: TextIO):
        self._console = Console(file=stream)
        self._live = None
        self._states: dict[str, tuple] = {}
        self._last = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=2)

    def __enter__(self):
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live:
            self._live.stop()

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Takes the rows as they are now."""
        if self._live:
            self._live.update(_table(rows))
            return
        is_time = time.monotonic() - self._last > SECONDS_BETWEEN_LINES
        for row in rows:
            key, state = row["name"], (row["state"], row["restarts"])
            is_new = self._states.get(key, ("waiting", 0)) != state
            self._states[key] = state
            if is_new or (is_time and row["state"] == "running"):
                self._console.print(_line(row), highlight=False, soft_wrap=True)
        if is_time:
            self._last = time.monotonic()


def _line(row: dict[str, Any]) -> str:
    text = f"{row['name']}  {row['state']}  step {_step(row)}"
    for name, value in _numbers(row).items():
        text += f"  {name} {value}" if value else ""
    if row["restarts"]:
        text += f"  restarts {row['restarts']}"
    return text + (f"  ({row['why']})" if row["why"] else "")


def _step(row: dict[str, Any]) -> str:
    return f"{row['step']}/{row['steps']}" if row["steps"] else str(row["step"])


def _numbers(row: dict[str, Any]) -> dict[str, str]:
    forms = {
        "loss": (row["loss"], ".3f"),
        "val_loss": (row["val_loss"], ".4f"),
        "tokens/s": (row["tokens_per_second"], ",.0f"),
    }
    return {
        name: "" if value is None else f"{value:{form}}"
        for name, (value, form) in forms.items()
    }


def _table(rows: list[dict[str, Any]]) -> RichTable:
    table = RichTable(box=None, pad_edge=False)
    for name in ("run", "state", "where"):
        table.add_column(name)
    for name in ("step", "loss", "val_loss", "tokens/s", "restarts"):
        table.add_column(name, justify="right")
    for row in rows:
        colour = COLOURS.get(row["state"], "dim")
        table.add_row(
            row["name"],
            f"[{colour}]{row['state']}[/]",
            row["slot"],
            _step(row),
            *_numbers(row).values(),
            str(row["restarts"]) if row["restarts"] else "",
        )
    return table
