"""The table of arguments in layers.md is made from the dataclasses."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_table_of_arguments_is_that_of_the_dataclasses():
    made = runpy.run_path(str(DOCS / "arguments.py"))
    page = (DOCS / "layers.md").read_text("utf-8")
    assert made["with_table"](page) == page, "run: python docs/arguments.py"
