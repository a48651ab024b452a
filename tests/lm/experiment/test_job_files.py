"""Job files for the engines of clusters."""

import subprocess

import pytest
import yaml

from trix_jax.cli.experiment import _chosen
from trix_jax.cli.main import main
from trix_jax.lm.experiment.job_files import render
from trix_jax.lm.experiment.spec import Spec


@pytest.mark.parametrize("engine", ["slurm", "kubernetes", "skypilot"])
def test_render_hands_every_run_to_the_engine(small, engine, capsys, tmp_path):
    assert main(["experiment", str(small), "--render", engine, "--workdir", "/r"]) == 0
    text = capsys.readouterr().out
    for name in ("s/lookup/seed-1", "s/dense/seed-2"):
        assert name in text
    assert f"trix-jax experiment {small} --workdir /r --slots 1 --only" in text
    if engine == "slurm":
        assert "--array=0-3%4" in text
        (tmp_path / "job").write_text(text)
        subprocess.run(["bash", "-n", tmp_path / "job"], check=True)
        return
    tree = yaml.safe_load(text)
    script = tree["run"] if engine == "skypilot" else _args(tree)
    subprocess.run(["bash", "-n", "-c", script], check=True)


def _args(tree):
    (container,) = tree["spec"]["template"]["spec"]["containers"]
    return container["args"][0]


def test_render_gives_a_job_of_one_name_per_index():
    text = render("slurm", "E 1", ["a/b/seed-1"], "e.yaml", "/w", 1)
    assert "--job-name=e-1" in text
    assert "--array=0-0%1" in text


def test_a_runs_whole_name_is_that_run_alone():
    specs = [Spec("e", "s", "dense", seed, 6, (), "data/s") for seed in (1, 10, 12, 2)]
    assert _chosen(specs, "s/dense/seed-1") == specs[:1]
    assert _chosen(specs, "s/dense/seed") == specs
