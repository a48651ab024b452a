"""An experiment's file and its notes, and the commands of its runs."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from trix_jax.cli.experiment import parse_run
from trix_jax.lm.experiment.spec import (
    Spec,
    command,
    public_command,
    read_experiment,
    read_notes,
    write_notes,
)

ROOT = Path(__file__).parents[3]
COMMITTED = sorted((ROOT / "experiments/scale").glob("*.yaml"))


def test_read_experiment_makes_a_run_of_every_size_arm_and_seed(small):
    experiment = read_experiment(small, parse_run)
    names = [spec.name for spec in experiment.specs]
    assert names == [f"s/{arm}/seed-{n}" for arm in ("lookup", "dense") for n in (1, 2)]
    assert experiment.configs["s", "dense"].train.learning_rate == 2e-3
    assert {spec.steps for spec in experiment.specs} == {6}
    assert (experiment.title, experiment.label) == ("small", "A test.")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"arms": []}, "arms in .* must be a list with entries"),
        ({"sizes": {"s": "nowhere.yaml"}}, "config nowhere.yaml of .* is not there"),
        ({"sizes": {"s": {"data.path": "x"}}}, "sizes.s in .* must have a config"),
        ({"arm_set": {"moe": {}}}, "arm_set in .* must name arms. Got 'moe'"),
        ({"set": {"seed": 7}}, "set.seed in .* left out: seeds or arm_seeds says"),
        ({"set": {"arm": "dense"}}, "set.arm in .* left out: arms says what runs"),
        ({"arm_set": {"dense": {"seed": 7}}}, "arm_set.dense.seed in .* left out"),
        ({"sizes": {"s": {"config": "c.yaml", "arm": "x"}}}, "sizes.s.arm in .* left"),
        ({"colour": "red"}, "colour in .* must be one of"),
        ({"arm_seeds": {"moe": [1]}}, "arm_seeds in .* must name arms. Got 'moe'"),
        ({"arm_seeds": {"dense": []}}, "arm_seeds.dense in .* of different entries"),
        ({"arm_seeds": {"dense": 3}}, "arm_seeds.dense in .* must be a list"),
        ({"seeds": [1, 1]}, r"seeds in .* of different entries. Got \[1, 1\]"),
        ({"seeds": [[1]]}, r"seeds in .* must be whole numbers .* Got \[\[1\]\]"),
        ({"seeds": [1.7]}, r"seeds in .* must be whole numbers .* Got \[1.7\]"),
        ({"seeds": [-1]}, r"seeds in .* must be whole numbers .* Got \[-1\]"),
        ({"seeds": [True]}, r"seeds in .* must be whole numbers .* Got \[True\]"),
        ({"seeds": ["2"]}, r"seeds in .* must be whole numbers .* Got \['2'\]"),
        ({"seeds": [1, "1"]}, "seeds in .* must be a list of different entries"),
        ({"arm_seeds": {"dense": [1.5]}}, r"arm_seeds.dense in .* whole numbers"),
        ({"seeds": 3}, "seeds in .* must be a list. Got 3"),
        ({"set": ["model.d_model"]}, "set in .* must be a mapping. Got"),
        ({"sizes": {"s": 3}}, "sizes.s in .* must be the path of a config, or a map"),
        ({"sizes": {"s": ["c.yaml"]}}, "sizes.s in .* must be the path of a config"),
        ({"sizes": {"s": {"config": ["c"]}}}, "sizes.s in .* must have a config"),
        ({"arm_set": {"dense": 3}}, "arm_set.dense in .* must be a mapping of flags"),
        ({"arm_set": ["dense"]}, "arm_set in .* must be a mapping. Got"),
        ({"arms": ["lookup", "dense", "dense"]}, "arms in .* of different entries"),
        (
            {"arms": ["moe"], "arm_set": {}},
            "arm must be one of dense, lookup, base",
        ),
        (
            {"arm_set": {"dense": {"data.tokenizer": "char"}}},
            "the arms of s in .* must share their data",
        ),
    ],
)
def test_read_experiment_says_what_is_wrong(small, change, match):
    tree = yaml.safe_load(small.read_text()) | change
    small.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=match):
        read_experiment(small, parse_run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[] if path.stem == "e2" else pytest.mark.slow
        )
        for path in COMMITTED
    ],
)
def test_committed_experiment_reads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    experiment = read_experiment(path, parse_run)
    assert experiment.name == path.stem
    tree = yaml.safe_load(path.read_text())
    if "like" in tree:
        tree = yaml.safe_load((path.parent / tree["like"]).read_text()) | tree
    seeds = tree.get("arm_seeds", {})
    of_size = sum(len(seeds.get(arm, tree["seeds"])) for arm in tree["arms"])
    names = {spec.name for spec in experiment.specs}
    assert len(names) == len(tree["sizes"]) * of_size


def test_file_that_is_like_one_of_the_wrong_shape_names_it(small, tmp_path):
    tree = yaml.safe_load(small.read_text()) | {"set": ["model.d_model"]}
    small.write_text(yaml.safe_dump(tree))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({"like": "small.yaml"}))
    with pytest.raises(ValueError, match=r"set in .*small\.yaml must be a mapping"):
        read_experiment(tmp_path / "other.yaml", parse_run)


def test_file_that_is_like_another_takes_what_it_does_not_say(small, tmp_path):
    tree = yaml.safe_load(small.read_text())
    tree["arm_set"]["lookup"] = {"train.steps": 5}
    tree["arm_seeds"] = {"lookup": [8]}
    small.write_text(yaml.safe_dump(tree))
    path = tmp_path / "other.yaml"
    own = {
        "like": "small.yaml",
        "arms": ["dense", "dense-wide"],
        "seeds": [1],
        "arm_seeds": {"dense-wide": [4, 5]},
        "set": {"train.batch_size": 3},
        "arm_set": {"dense-wide": {"arm": "dense", "model.ffn_width": 40}},
    }
    path.write_text(yaml.safe_dump(own))
    found = read_experiment(path, parse_run)
    assert (found.name, found.label) == ("other", "A test.")
    assert [s.name for s in found.specs] == [
        "s/dense/seed-1",
        "s/dense-wide/seed-4",
        "s/dense-wide/seed-5",
    ]
    dense, wide = (found.configs["s", arm] for arm in own["arms"])
    assert (dense.train.batch_size, dense.train.learning_rate) == (3, 2e-3)
    assert (wide.arm, wide.model.ffn, wide.model.ffn_width) == ("dense", "dense", 40)
    assert wide.train.learning_rate == 1e-3
    assert found.specs[1].flags[1:3] == ("--arm", "dense")
    second = tmp_path / "second.yaml"
    second.write_text("like: other.yaml\n")
    with pytest.raises(ValueError, match=r"like in .* without a like of its own"):
        read_experiment(second, parse_run)


def test_settings_go_over_those_of_all_one_by_one_however_they_are_written(
    small, tmp_path
):
    tree = yaml.safe_load(small.read_text())
    tree["set"] |= {"train": {"steps": 40, "batch-size": 4}, "model": {"n_heads": 1}}
    tree["arm_set"] = {"dense": {"train": {"learning_rate": 2e-3}}}
    small.write_text(yaml.safe_dump(tree))
    found = read_experiment(small, parse_run).configs["s", "dense"]
    train = found.train.steps, found.train.batch_size, found.train.learning_rate
    assert (*train, found.model.n_heads) == (40, 4, 2e-3, 1)
    path = tmp_path / "like.yaml"
    path.write_text(yaml.safe_dump({"like": "small.yaml", "set": {"train.steps": 20}}))
    found = read_experiment(path, parse_run).configs["s", "dense"]
    assert (found.train.steps, found.train.batch_size) == (20, 4)
    tree["set"]["train.steps"] = 10
    small.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"set in .* must give train.steps once"):
        read_experiment(small, parse_run)


def test_notes_say_what_was_asked_and_refuse_another_experiment(small, tmp_path):
    experiment, workdir = read_experiment(small, parse_run), tmp_path / "e"
    workdir.mkdir()
    write_notes(experiment, workdir)
    found = read_notes(workdir)
    assert found.label == "A test."
    assert [s._replace(store="data/s") for s in found.specs] == experiment.specs
    words = command(found.specs[0], workdir / "runs")
    assert words[0] == "train"
    assert words[-4:] == [
        "--data.path",
        str(workdir / "data/s"),
        "--workdir",
        str(workdir / "runs/s/lookup/seed-1"),
    ]
    with pytest.raises(ValueError, match=r"holds the experiment .small.\. Got .other."):
        write_notes(experiment._replace(name="other"), workdir)


def test_notes_of_earlier_versions_read(tmp_path):
    run = {
        "size": "s", "arm": "dense", "seed": 1, "steps": 6,
        "flags": ["p.yaml", "--arm", "dense"], "store": "data/s",
    }  # fmt: skip
    tree = {"name": "e", "title": None, "question": None, "label": None, "runs": [run]}
    (tmp_path / "experiment.json").write_text(json.dumps(tree))
    (spec,) = read_notes(tmp_path).specs
    assert (spec.setting, spec.name, spec.rate) == ("e", "s/dense/seed-1", None)
    assert spec.flags == ("p.yaml", "--arm", "dense")


def test_notes_that_are_none_are_named(tmp_path):
    (tmp_path / "experiment.json").write_text("{}")
    with pytest.raises(ValueError, match=r"experiment\.json does not describe"):
        read_notes(tmp_path)


def test_run_of_a_sweep_is_named_by_its_rate_and_a_patch_is_its_program(tmp_path):
    flags = ("p.yaml", "--train.learning-rate", "0.002")
    spec = Spec("pond", "", "duck", 42, 0, flags, "/store", 2e-3, ("module", "wings"))
    assert spec.name == "pond/duck-lr0.002-seed42"
    words = command(spec, tmp_path)
    assert words[:3] == ["wings", "train", "p.yaml"]
    assert words[-1] == str(tmp_path / spec.name)
    assert public_command(spec).startswith("python -m module wings train p.yaml --")


def test_public_command_has_no_path_of_the_machine():
    paths = ("--data.path", "/data/x", "--data.val-path", "/data/y")
    flags = ("/home/me/configs/tiny.yaml", "--arm", "dense", *paths)
    words = public_command(Spec("e", "s", "dense", 1, 5, flags, "/store"))
    assert words == "trix-jax train configs/tiny.yaml --arm dense --data.path data/s"
    here = (str(Path.cwd() / "a/b/c.yaml"), "--arm", "dense")
    words = public_command(Spec("e", "s", "dense", 1, 5, here, "/store"))
    assert words.startswith("trix-jax train a/b/c.yaml --arm dense")


def test_public_command_is_what_a_shell_reads_as_the_flags():
    flags = ("a.yaml", "--data.end-of-text", "<|endoftext|>", "--arm", "it's")
    words = public_command(Spec("e", "s", "dense", 1, 5, flags, "/store"))
    assert shlex.split(words) == ["trix-jax", "train", *flags, "--data.path", "data/s"]
