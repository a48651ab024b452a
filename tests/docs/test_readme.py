"""Nothing rots: the README's blocks run, its links resolve, and it can be read in
two minutes. Its table is held by `tests/experiments/test_front_page.py`.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from trix_jax.cli.main import VERBS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
HEADINGS = [
    "Two commands",
    "In your model",
    "What it buys",
    "When to use it",
    "Train, restore, export",
    "Hardware",
    "The map",
]
SHRUNKEN = (
    "--data.source text --data.path corpus.txt --model.d-model 32 --model.n-layers 1 "
    "--model.context 16 --train.steps 10 --train.eval-every 5"
)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def prose(text):
    """What is neither code nor table, image or comment; of links what is shown."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|!\[.*?\]\(.*?\)|^\|.*$", "", text, flags=re.M)
    return re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text)


def sentences(text):
    """Paragraphs and list items, cut after `.`, `!`, `?` and `:`; no number's point."""
    for paragraph in re.split(r"\n\s*\n|^#.*$|^- ", text, flags=re.M):
        yield from re.split(r"(?<=[.!?:])\s", " ".join(paragraph.split()))


def test_readme_has_at_most_650_words_of_prose():
    assert len(prose(README).split()) <= 650


def test_readme_has_no_sentence_over_40_words():
    long = [s for s in sentences(prose(README)) if len(s.split()) > 40]
    assert not long


def test_readme_headings_stand_in_the_order_of_a_reader():
    code = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)
    assert re.findall(r"^## (.*)$", code, flags=re.M) == HEADINGS
    assert README.index("docs/trix.svg") < README.index("## Two commands")


def test_readme_results_have_at_most_six_rows():
    (part,) = re.findall(r"<!-- front page: comparison -->\n(.*?)<!--", README, re.S)
    assert 2 < len(part.splitlines()) <= 2 + 6  # below head and rule


@pytest.mark.slow
def test_readme_commands_and_python_run_in_order(user_env, tmp_path):
    rows = (f"KING {i * 7 % 13} the tile that matches {i * i % 97}" for i in range(900))
    (tmp_path / "corpus.txt").write_text("\n".join(rows))
    path = f"{Path(sys.executable).parent}{os.pathsep}{user_env['PATH']}"
    env = {**user_env, "PATH": path}

    def run(command):
        done = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    train, *others = (block for block in blocks("bash") if "trix-jax train" in block)
    assert not others
    for line in train.splitlines():
        command = shlex.split(line, comments=True)
        if command[1] == "train":
            command[2] = str(ROOT / command[2])
            command += shlex.split(SHRUNKEN)
        run(command)
    assert (tmp_path / "runs" / "packed" / "model.safetensors").is_file()
    (tmp_path / "readme.py").write_text(
        "\n".join(
            [
                *blocks("python"),
                "assert loss > 0 and packed['packed']",
                "assert logits.shape[-1] == tokenizer.vocab_size",
            ]
        )
    )
    run([sys.executable, "readme.py"])


def test_readme_links_resolve():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_readme_commands_name_verbs_that_exist():
    verbs = re.findall(r"trix-jax ([a-z]+)", "\n".join(blocks("bash")))
    assert set(verbs) >= {"demo", "train", "eval", "generate", "export"}
    assert set(verbs) <= set(VERBS)
