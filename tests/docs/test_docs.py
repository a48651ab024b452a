"""Nothing rots: every block of the site runs, as it does when the site is built,
without Sphinx.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
CELL = re.compile(r"^```\{code-cell\} python\n(.*?)^```", flags=re.M | re.S)
PAGES = {page.stem: CELL.findall(page.read_text("utf-8")) for page in DOCS.glob("*.md")}
EXECUTED = sorted(page for page, cells in PAGES.items() if cells)


SHELL = "import subprocess\nsubprocess.run(['bash', '-c', {!r}], check=True)\n"
WITH_SHELL = [p for p in EXECUTED if any(c.startswith("%%bash") for c in PAGES[p])]
# Python alone shares a process: most of a page's time is importing and compiling.
GROUPS = {page: [page] for page in WITH_SHELL} | {
    "python": [page for page in EXECUTED if page not in WITH_SHELL]
}


def as_script(pages):
    """The cells of pages as one script, names of their own for each page."""
    for page in pages:
        cells = [
            SHELL.format(cell.removeprefix("%%bash\n")) if "%%bash" in cell else cell
            for cell in PAGES[page]
        ]
        code = "\n".join(cells)
        yield f"exec(compile({code!r}, '{page}.md', 'exec'), {{}})"


def test_pages_that_teach_a_use_have_blocks_that_run():
    assert {"own-model", "training", "inspect", "out", "format"} <= set(EXECUTED)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_page_blocks_run_in_order(group, user_env, tmp_path):
    if group == "out":
        pytest.importorskip("flatbuffers")
    script = tmp_path / "pages.py"
    script.write_text("\n".join(as_script(GROUPS[group])))
    bin_folder = Path(sys.executable).parent
    env = {**user_env, "PATH": f"{bin_folder}{os.pathsep}{user_env['PATH']}"}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_pages_are_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text("utf-8")
    listed = set(re.findall(r"^([a-z-]+)$", index, flags=re.M))
    assert listed == set(PAGES) - {"index"}


def test_pages_link_to_pages_and_files_that_are_there():
    for page in PAGES:
        text = CELL.sub("", (DOCS / f"{page}.md").read_text("utf-8"))
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (DOCS / target).exists(), f"{page}.md: {target}"
        for target in re.findall(
            r"^```\{(?:literal)?include\} (\S+)", text, flags=re.M
        ):
            assert (DOCS / target).exists(), f"{page}.md: {target}"
