"""The launch recipes: whole files whose command the program understands."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from trix_jax.cli.train import Args
from trix_jax.lm.presets import parse_preset

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "docs" / "launch"


def commands_of(path: Path) -> list[list[str]]:
    """What follows `trix-jax train` in a recipe."""
    text = path.read_text("utf-8")
    if path.name == "kubernetes.yaml":
        _, job = yaml.safe_load_all(text)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"] == ["trix-jax"]
        assert container["args"][0] == "train"
        return [container["args"][1:]]
    if path.suffix == ".yaml":
        text = yaml.safe_load(text)["run"]
    lines = re.findall(r"trix-jax train (.*?--distributed)", text)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("name", ["slurm.sbatch", "kubernetes.yaml", "skypilot.yaml"])
def test_recipe_holds_a_command_that_parses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = commands_of(LAUNCH / name)
    args = parse_preset(Args, command, "train")
    assert args.distributed
    assert args.config.train.batch_size == 256


def test_slurm_recipe_is_valid_shell():
    subprocess.run(["bash", "-n", LAUNCH / "slurm.sbatch"], check=True)
