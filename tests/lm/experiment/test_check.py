"""Ended runs of other settings or data are no results of what is asked for now."""

import dataclasses
import json
import shutil

import pytest
import yaml

from trix_jax.cli import experiment as cli
from trix_jax.cli.experiment import parse_run
from trix_jax.lm.config import resolve, to_tree
from trix_jax.lm.data import prepare
from trix_jax.lm.experiment import results
from trix_jax.lm.experiment.check import check_ended
from trix_jax.lm.experiment.spec import public_command, read_experiment, write_notes

DIVERGED = "validation loss (nan) is not finite after step 3: stopped, and not saved."


def changed(path, **values):
    """The experiment with other settings under `set`."""
    tree = yaml.safe_load(path.read_text())
    tree["set"] |= values
    path.write_text(yaml.safe_dump(tree))
    return read_experiment(path, parse_run)


@pytest.fixture
def ended(small, tmp_path):
    """The directory of an experiment whose runs are there, as training leaves them: two
    are done, one diverged, one goes on.
    """
    experiment, workdir = read_experiment(small, parse_run), tmp_path / "e"
    store = prepare(experiment.data["s"], workdir / "data/s", lambda _: None)
    write_notes(experiment, workdir)
    (workdir / "metrics.json").write_text("[]")
    for spec in experiment.specs:
        directory = workdir / "runs" / spec.name
        config = experiment.configs[spec.size, spec.arm]
        data = dataclasses.replace(config.data, path=str(store.directory))
        config = dataclasses.replace(config, seed=spec.seed, data=data)
        tokenizer = store.tokenizer
        config = resolve(config, tokenizer.vocab_size, None, tokenizer.eot)
        step = directory / "checkpoints/00000006"
        step.mkdir(parents=True)
        meta = {"data_fingerprint": store.fingerprint}
        (step / "meta.json").write_text(json.dumps(meta))
        (directory / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    done, diverged = (workdir / "runs/s" / arm for arm in ("lookup", "dense"))
    for seed in (1, 2):
        (done / f"seed-{seed}/summary.json").write_text('{"steps": 6}')
        (done / f"seed-{seed}/REPORT.md").write_text("")
    (diverged / "seed-1/log.txt").write_text(f"{DIVERGED}\n")
    return workdir


def test_runs_of_the_settings_that_are_asked_for_pass(small, ended):
    check_ended(read_experiment(small, parse_run), ended)
    check_ended(changed(small, **{"train.sampler": "epochs"}), ended)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("train.weight_decay", 0.3, r"weight_decay was 0\.1 and is 0\.3"),
        ("model.d_model", 32, r"lookup/seed-1 holds .*d_model was 16 and is 32"),
        ("train.sampler", "offsets", "sampler was 'epochs' and is 'offsets'"),
        ("train.steps", 3, r"lookup/seed-1 holds .*steps was 6 and is 3"),
        ("train.steps", 9, "cannot be extended to 9"),
    ],
)
def test_experiment_with_other_settings_is_refused_and_overwrites_nothing(
    small, ended, name, value, match
):
    files = {p: p.read_bytes() for p in ended.rglob("*") if p.is_file()}
    changed(small, **{name: value})
    with pytest.raises(ValueError, match=match):
        cli.main([str(small), "--workdir", str(ended)])
    assert {p: p.read_bytes() for p in ended.rglob("*") if p.is_file()} == files


def test_a_diverged_run_of_other_settings_is_refused(small, ended):
    tree = yaml.safe_load(small.read_text())
    tree["arm_set"]["dense"]["train.learning_rate"] = 1e-3
    small.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"dense/seed-1 .* was 0\.002 and is 0\.001"):
        check_ended(read_experiment(small, parse_run), ended)


def test_a_record_of_another_command_is_refused_once_its_directory_is_gone(
    small, ended
):
    experiment = read_experiment(small, parse_run)
    spec = experiment.specs[0]
    tree = {**spec._asdict(), "val_loss": 1.5, "command": public_command(spec)}
    results.write(ended / "metrics.json", [results.from_tree(tree)])
    shutil.rmtree(ended / "runs" / spec.name)
    check_ended(experiment, ended)
    shutil.rmtree(ended / "runs")
    tree = yaml.safe_load(small.read_text())
    tree["set"] = dict(reversed(tree["set"].items()))
    small.write_text(yaml.safe_dump(tree, sort_keys=False))
    check_ended(read_experiment(small, parse_run), ended)
    other = changed(small, **{"train.weight_decay": 0.3})
    with pytest.raises(ValueError, match=r"holds s/lookup/seed-1, made by .* is gone"):
        check_ended(other, ended)


def test_a_run_that_goes_on_is_left_to_its_training(small, ended):
    for path in ended.glob("runs/s/lookup/*/REPORT.md"):
        path.unlink()
    (ended / "runs/s/dense/seed-1/log.txt").unlink()
    check_ended(changed(small, **{"train.weight_decay": 0.3}), ended)


def test_runs_on_another_store_are_refused(small, ended, tmp_path):
    (tmp_path / "other.txt").write_text("another text altogether " * 400)
    data = read_experiment(small, parse_run).data["s"]
    data = dataclasses.replace(data, path=str(tmp_path / "other.txt"))
    prepare(data, tmp_path / "store", lambda _: None)
    changed(small, **{"data.path": str(tmp_path / "store")})
    notes = (ended / "experiment.json").read_bytes()
    with pytest.raises(ValueError, match=r"lookup/seed-1 holds a run on other data"):
        cli.main([str(small), "--workdir", str(ended)])
    assert (ended / "experiment.json").read_bytes() == notes
