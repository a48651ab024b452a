"""A run that starts from another's weights."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

from trix_jax.cli.train import _model_of
from trix_jax.files import read_json
from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import RunConfig
from trix_jax.lm.data import load_tokenizer, open_store, train_batches
from trix_jax.lm.presets import parse_preset
from trix_jax.lm.serve.export import export
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train import initial, metrics
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.optimizer import learning_rate_schedule
from trix_jax.nn.transformer import TransformerLM


def quiet(_):
    pass


def with_model(config, **changes):
    model = dataclasses.replace(config.model, **changes)
    return dataclasses.replace(config, model=model)


def losses(run):
    lines = metrics.read(run / "metrics.jsonl")
    return [line["loss"] for line in lines if line["event"] == "step"]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def state(run, step):
    return checkpoint.restore_arrays(run / "checkpoints", step)


def first_loss(run, config):
    """Of the first batch, with the weights of a run's best step."""
    model, variables, _ = load_run(run, "best")
    data = open_store(run / "data").train
    batch = next(train_batches(data, batch_size=8, context=16, seed=config.seed))
    (logits, _, _), _ = model.apply(
        variables, batch[:, :-1], True, progress=0.0, mutable=["routing"]
    )
    cross = optax.softmax_cross_entropy_with_integer_labels
    return float(cross(logits, jnp.asarray(batch[:, 1:])).mean())


@pytest.fixture(scope="module")
def source(run_dir, tmp_path_factory):
    return shutil.copytree(run_dir, tmp_path_factory.mktemp("source") / "run")


@pytest.fixture(scope="module")
def tuned(source, tiny_config, one_device, tmp_path_factory):
    """A run begun from `source`, and what it said."""
    run, said = tmp_path_factory.mktemp("tuned") / "run", []
    here = {"init_from": str(source), "devices": one_device}
    train(tiny_config, run, report=said.append, **here)
    return run, said


@pytest.mark.slow
def test_run_starts_from_the_weights_of_the_best_step_with_a_new_optimizer(
    source, tuned, tiny_config
):
    run, said = tuned
    assert f"starting from the weights of step 10 of {source}" in said
    lines = [line for line in metrics.read(run / "metrics.jsonl") if "lr" in line]
    assert lines[0]["loss"] == pytest.approx(first_loss(source, tiny_config), rel=1e-5)
    rate = float(learning_rate_schedule(tiny_config.train)(0))
    assert lines[0]["lr"] == pytest.approx(rate)
    assert state(run, 5)["step"] == 5


def test_run_records_where_its_weights_came_from(source, tuned):
    run, _ = tuned
    sha256 = read_json(source / "checkpoints/00000010/manifest.json")["sha256"]
    record = {"path": str(source), "step": 10, "sha256": sha256}
    assert read_json(run / "init.json") == record
    assert read_json(run / "summary.json")["init_from"] == record
    assert checkpoint.read_meta(run / "checkpoints", 5)["init_from"] == record


@pytest.mark.parametrize("is_named", [True, False])
def test_run_goes_on_when_its_source_is_gone(
    source, tuned, tiny_config, one_device, tmp_path, is_named
):
    run = shutil.copytree(tuned[0], tmp_path / "half")
    shutil.rmtree(run / "checkpoints" / "00000010")
    gone = tmp_path / "gone"
    record = read_json(run / "init.json") | {"path": str(gone)}
    (run / "init.json").write_text(json.dumps(record))
    here = {"init_from": str(gone) if is_named else None, "devices": one_device}
    train(tiny_config, run, report=quiet, **here)
    assert losses(run) == losses(tuned[0])
    assert_same(state(run, 10), state(tuned[0], 10))
    assert read_json(run / "init.json") == record


def test_step_folder_is_a_source(source, tiny_config):
    found = initial.find(str(source / "checkpoints" / "00000005"))
    store = open_store(source / "data")
    weights = initial.weights(found, tiny_config_of(source), store, quiet)
    wanted = state(source, 5)
    assert found.step == 5
    assert_same(weights, {name: wanted[name] for name in ("params", "routing")})


def tiny_config_of(run):
    return initial.find(str(run)).settings


def test_export_of_real_weights_is_a_source(source, tiny_config, tmp_path):
    config = with_model(tiny_config_of(source), ffn="dense")
    model = TransformerLM(config.model)
    tokens = jnp.zeros((1, 16), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(3), tokens))
    draw = np.random.default_rng(3).random
    variables = jax.tree.map(lambda leaf: draw(leaf.shape, np.float32), shapes)
    tokenizer = load_tokenizer(source / "tokenizer.json")
    export(model, variables, tokenizer, tmp_path / "out")
    found = initial.find(str(tmp_path / "out"))
    weights = initial.weights(found, config, open_store(source / "data"), quiet)
    assert_same(weights, {"params": variables["params"], "routing": {}})
    assert found.record["step"] is None


def test_export_of_packed_weights_is_refused_naming_what_to_give(source, tmp_path):
    export(*load_run(source), tmp_path / "out")
    found = initial.find(str(tmp_path / "out"))
    store = open_store(source / "data")
    with pytest.raises(ValueError, match=r"packed weights.*give the run that it was"):
        initial.weights(found, tiny_config_of(source), store, quiet)


def test_settings_that_differ_and_fit_are_told(source):
    config = with_model(tiny_config_of(source), activation="gelu", dropout=0.1)
    said = []
    store = open_store(source / "data")
    initial.weights(initial.find(str(source)), config, store, said.append)
    lines = [line.partition("'s: ")[2] for line in said[1:]]
    assert lines == [
        "model.activation was None and is 'gelu'",
        "model.dropout was 0.0 and is 0.1",
    ]


def test_other_shapes_are_refused_leaf_by_leaf_and_nothing_is_written(
    source, tiny_config, one_device, tmp_path
):
    config = with_model(tiny_config, d_model=32)
    said = (
        r"params/embed/embedding: expected float32\[\d+,32\], found float32\[\d+,16\]"
    )
    here = {"init_from": str(source), "devices": one_device}
    with pytest.raises(ValueError, match=said):
        train(config, tmp_path / "new", report=quiet, **here)
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {"data"}


def test_another_tokenizer_is_refused(source, tiny_config, one_device, tmp_path):
    (tmp_path / "other.txt").write_text("ABCDEFGH\n" * 500)
    data = dataclasses.replace(tiny_config.data, path=str(tmp_path / "other.txt"))
    config = dataclasses.replace(tiny_config, data=data)
    here = {"init_from": str(source), "devices": one_device}
    with pytest.raises(ValueError, match="must have the tokenizer of"):
        train(config, tmp_path / "new", report=quiet, **here)


def test_damaged_step_is_refused(source, tmp_path):
    run = shutil.copytree(source, tmp_path / "run")
    (run / "checkpoints" / "00000005" / "meta.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is damaged: meta\.json has 2 bytes"):
        initial.find(str(run / "checkpoints" / "00000005"))


def test_what_is_no_source_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a run directory, a step's folder"):
        initial.find(str(tmp_path))


def test_directory_with_a_run_takes_no_other_source(
    run_dir, tuned, tiny_config, one_device
):
    for run in (run_dir, tuned[0]):
        with pytest.raises(ValueError, match=r"starts a new run, and .* holds one"):
            train(
                tiny_config,
                run,
                init_from="elsewhere",
                devices=one_device,
                report=quiet,
            )


def test_run_without_a_checkpoint_yet_wants_its_source_again(
    tuned, tiny_config, one_device, tmp_path
):
    run = shutil.copytree(tuned[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()  # written at the end
    with pytest.raises(ValueError, match=r"begun with --init-from .* give it again"):
        train(tiny_config, run, devices=one_device, report=quiet)


@dataclasses.dataclass(frozen=True)
class Args:
    config: RunConfig
    init_from: str = ""


def test_model_is_the_source_s_unless_typed(source, tuned, tmp_path):
    wanted = yaml.safe_load((source / "config.yaml").read_text())["model"]
    for start in (
        initial.defaults(tmp_path / "new", str(source)),
        initial.defaults(tuned[0], "gone"),
    ):
        flags = ["--config.model.dropout", "0.1"]
        config = parse_preset(Args, flags, "train", start).config
        assert dataclasses.asdict(config.model) == wanted | {
            "vocab_size": None,
            "end_token": None,
            "dropout": 0.1,
        }
        assert config.arm == "sparse"
    assert initial.defaults(tmp_path / "new", None) is None


def test_run_that_holds_addresses_starts_from_one_that_does_not(source, tiny_config):
    routing = dataclasses.replace(
        tiny_config.model.routing, hold_after=0.5, hold="scores"
    )
    store = open_store(source / "data")
    vocabulary = store.tokenizer.vocab_size
    config = with_model(tiny_config, routing=routing, vocab_size=vocabulary)
    found = initial.weights(initial.find(str(source)), config, store, quiet)
    before = state(source, 10)
    added = found["routing"].pop("router_input")
    assert not added["held"]
    np.testing.assert_array_equal(added["rows"], before["params"]["embed"]["embedding"])
    router = found["routing"]["block_00"]["ffn"]["tiles"]["router"]
    assert not router.pop("held")
    assert_same(found["routing"], before["routing"])
    assert_same(found["params"], before["params"])


def test_init_from_keeps_the_underscores_of_its_path(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_run").symlink_to(source)
    for flag in ("--init_from=my_run", "--init-from=my_run"):
        found = _model_of([flag, "--workdir", str(tmp_path / "new")])
        assert found is not None
        assert found.model.d_model == 16
