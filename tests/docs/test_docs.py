"""Nothing rots: every block of the site runs, as it does when the site is built,
without Sphinx.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trix_jax

DOCS = Path(__file__).parents[2] / "docs"
CELL = re.compile(r"^```\{code-cell\} python\n(.*?)^```", flags=re.M | re.S)
PAGES = {page.stem: CELL.findall(page.read_text("utf-8")) for page in DOCS.glob("*.md")}
EXECUTED = sorted(page for page, cells in PAGES.items() if cells)


SHELL = "import subprocess\nsubprocess.run(['bash', '-c', {!r}], check=True)\n"
# What a reader who has never seen TriX can do from the site alone; a test each.
PATHS = ("own-model", "own-model-nnx", "training", "fine-tuning", "inspect", "out")


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
    assert {*PATHS, "format"} <= set(EXECUTED)


@pytest.fixture
def run_pages(user_env, tmp_path):
    return lambda *pages, **env: run(pages, {**user_env, **env}, tmp_path)


def run(pages, env, tmp_path):
    script = tmp_path / "pages.py"
    script.write_text("\n".join(as_script(pages)))
    bin_folder = Path(sys.executable).parent
    env = {**env, "PATH": f"{bin_folder}{os.pathsep}{env['PATH']}"}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_reader_puts_a_layer_into_their_model_from_the_site_alone(run_pages):
    # Compiling is nearly all of the time; the site is built with XLA as it is.
    quick = "--xla_backend_optimization_level=0"
    run_pages("own-model", "own-model-nnx", XLA_FLAGS=quick)


@pytest.mark.slow
def test_reader_trains_from_the_site_alone(run_pages, tmp_path):
    run_pages("training")
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.slow
def test_reader_fine_tunes_from_the_site_alone(run_pages, tmp_path):
    said = run_pages("fine-tuning").stdout
    before, after = map(
        float, re.findall(r"^validation loss ([\d.]+) nats", said, re.M)
    )
    assert after < before - 0.1
    assert (tmp_path / "tuned" / "init.json").is_file()


@pytest.mark.slow
def test_reader_looks_inside_from_the_site_alone(run_pages, tmp_path):
    run_pages("inspect")
    assert "drawTiles" in (tmp_path / "run" / "inspect.html").read_text("utf-8")


@pytest.mark.slow
def test_reader_takes_a_model_out_from_the_site_alone(run_pages, tmp_path):
    run_pages("out")
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "model.stablehlo"}
    assert wanted <= {path.name for path in (tmp_path / "packed").iterdir()}


@pytest.mark.slow
def test_blocks_of_the_other_pages_run(run_pages):
    run_pages(*(page for page in EXECUTED if page not in PATHS))


def test_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text("utf-8")
    listed = set(re.findall(r"(?:auto\w+:: (?:\S+\.)?)(\w+)$", text, flags=re.M))
    assert set(trix_jax.__all__) <= listed


def test_pages_are_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text("utf-8")
    listed = set(re.findall(r"^([a-z][a-z-]*)$", index, flags=re.M))
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
