"""Nothing rots: the README's Python runs, its links resolve, its commands are those
there are.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from trix_jax.cli.main import VERBS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning")
def test_readme_python_blocks_run_in_order(run_dir, tmp_path, monkeypatch):
    demo = tmp_path / "runs" / "demo" / "trix"
    shutil.copytree(run_dir, demo)
    # The demo's last step is 800, the small run's 10; the text has the letters used
    # here.
    os.rename(demo / "checkpoints" / "00000005", demo / "checkpoints" / "00000800")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, block in enumerate(blocks("python")):
        block = block.replace('"def main("', '"the tile"')
        exec(compile(block, f"README.md block {number}", "exec"), names)
    assert names["output"].shape == names["x"].shape
    assert names["logits"].shape[-1] == names["tokenizer"].vocab_size
    assert set(names["state"]) >= {"params", "opt_state", "routing"}


def test_readme_links_resolve():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_readme_commands_name_verbs_that_exist():
    verbs = re.findall(r"trix-jax ([a-z]+)", "\n".join(blocks("bash")))
    assert set(verbs) >= {"demo", "train", "eval", "generate", "export"}
    assert set(verbs) <= set(VERBS)
