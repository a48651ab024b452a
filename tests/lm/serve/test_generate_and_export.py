"""Restore, evaluate, sample, export and load back, on one small run."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

import trix_jax
from trix_jax import TernaryConfig, TransformerConfig, TransformerLM, freeze
from trix_jax.cli.export import _about
from trix_jax.cli.main import main
from trix_jax.interop import safetensors
from trix_jax.lm.data import open_store
from trix_jax.lm.serve import load
from trix_jax.lm.serve.export import check_output, export
from trix_jax.lm.serve.generate import SamplingConfig, cut, generate, sample
from trix_jax.lm.serve.load import load_run, open_run_data, resolve_step
from trix_jax.lm.train.evaluate import evaluate
from trix_kernels import device


@pytest.fixture(scope="module")
def loaded(run_dir):
    return trix_jax.load_run(run_dir)


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export") / "model"
    model, variables, tokenizer = loaded
    return directory, export(model, variables, tokenizer, directory)


def last_eval(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "eval"][-1]


def test_load_run_evaluates_as_training_did(run_dir, loaded):
    model, variables, _ = loaded
    store = open_store(run_dir / "data")
    assert evaluate(model, variables, store).val_loss == last_eval(run_dir)["val_loss"]


@pytest.mark.slow
def test_load_run_in_a_process_that_did_not_train(run_dir, user_env):
    code = (
        "import sys, trix_jax; model, variables, tokenizer = trix_jax.load_run(sys.argv[1]);"
        "print(tokenizer.vocab_size, sorted(variables))"
    )
    command = [sys.executable, "-c", code, str(run_dir)]
    done = subprocess.run(command, env=user_env, capture_output=True, text=True)
    assert done.stdout.split("\n")[0].endswith("['params', 'routing']"), done.stderr


def test_load_run_step_best_and_number_resolve(run_dir):
    assert resolve_step(run_dir, "latest") == 10
    assert resolve_step(run_dir, 5) == 5
    assert resolve_step(run_dir, "best") in (5, 10)


def test_load_run_without_a_run_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="must be a run directory"):
        load_run(tmp_path)


def test_load_run_of_another_architecture_names_the_first_difference(run_dir, tmp_path):
    import shutil

    import yaml

    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["model"]["num_tiles"] = 8
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"does not fit its config: params.*should be"):
        load_run(tmp_path / "run")


@pytest.mark.slow
def test_evaluate_counts_every_validation_token_once_but_the_first(run_dir, loaded):
    model, variables, _ = loaded
    store = open_store(run_dir / "data")
    result = evaluate(model, variables, store, batch_size=3)
    other = evaluate(model, variables, store, batch_size=64)
    assert result.tokens == other.tokens == store.val_tokens - 1
    assert result.val_loss == pytest.approx(other.val_loss, rel=1e-6)
    assert result.routes.shape == (1, store.val_tokens - 1, 2)
    np.testing.assert_array_equal(result.routes, other.routes)
    assert np.sum(result.tile_usage) == pytest.approx(1)


@pytest.mark.slow
def test_generate_cached_equals_uncached_and_greedy_repeats(loaded):
    model, variables, tokenizer = loaded
    prompt = tokenizer.encode("the tile")
    greedy = SamplingConfig(temperature=0.0)
    new = list(generate(model, variables, prompt, 8, greedy))
    text = list(map(int, prompt))
    for token in new:
        logits, _, _ = model.apply(variables, jnp.asarray([text]))
        assert token == int(jnp.argmax(logits[0, -1]))
        text.append(token)


@pytest.mark.slow
def test_generate_goes_on_beyond_the_context(loaded):
    model, variables, tokenizer = loaded
    prompt = tokenizer.encode("the token " * 3)  # longer than the context
    new = list(generate(model, variables, prompt, 3 * model.config.context))
    assert len(new) == 3 * model.config.context
    assert all(0 <= token < tokenizer.vocab_size for token in new)


@pytest.mark.slow
def test_generate_same_seed_same_text_other_seed_other_text(loaded):
    model, variables, tokenizer = loaded
    prompt = tokenizer.encode("the")

    def text(seed):
        return list(generate(model, variables, prompt, 30, SamplingConfig(seed=seed)))

    assert text(1) == text(1)
    assert text(1) != text(2)


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "at least one token"), ([0, 9999], "prompt ids must")]
)
def test_generate_bad_prompt_raises(loaded, prompt, message):
    model, variables, _ = loaded
    with pytest.raises(ValueError, match=message):
        generate(model, variables, np.asarray(prompt, np.int32), 5)


def draws(config, logits, n=400):
    keys = jax.random.split(jax.random.key(0), n)
    many = jax.vmap(lambda key: sample(logits[None], key, config)[0])
    return np.bincount(many(keys), minlength=logits.size) / n


def test_sample_temperature_top_k_and_top_p_cut_what_they_say():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    free = draws(SamplingConfig(temperature=1.0), logits)
    np.testing.assert_allclose(free, [0.5, 0.3, 0.15, 0.05], atol=0.09)
    top_k = draws(SamplingConfig(temperature=1.0, top_k=2), logits)
    assert top_k[2:].sum() == 0
    assert (top_k[:2] > 0).all()
    top_p = draws(SamplingConfig(temperature=1.0, top_p=0.7), logits)
    assert top_p[2:].sum() == 0
    assert (top_p[:2] > 0).all()
    sharp = draws(SamplingConfig(temperature=0.05), logits)
    assert sharp[0] > 0.99
    assert draws(SamplingConfig(temperature=0.0), logits)[0] == 1


def shares_in_float64(logits, config):
    """What `cut` leaves, by counting down from the likeliest; of equals the earlier."""
    with np.errstate(over="ignore"):
        scaled = (logits - logits.max()).astype(np.float64) / config.temperature
    order = np.argsort(-logits, kind="stable")[: config.top_k or None]
    shares = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
    before = np.concatenate([[0.0], np.cumsum(shares)[:-1]])
    kept = order[before < config.top_p] if config.top_p < 1 else order
    full = np.zeros(logits.size)
    full[kept] = np.exp(scaled[kept])
    return full / full.sum()


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1.0, 1e38])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1e-9), (0, 0.9), (1, 1.0), (3, 0.9), (100, 1.0)]
)
def test_cut_at_its_limits_is_that_of_float64(temperature, top_k, top_p):
    logits = np.asarray([-3.0, 2.0, 7.5, 7.5, -80.0, 4.0, 0.0, 7.25], np.float32)
    config = SamplingConfig(temperature, top_k, top_p)
    got = np.asarray(jax.nn.softmax(cut(jnp.asarray(logits)[None], config)[0]))
    want = shares_in_float64(logits, config)
    # A share's own rounding, and that of exponents up to the greatest scaled logit.
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-7)


def test_tiniest_temperature_takes_the_likeliest():
    logits = jnp.asarray([1.0, 3.0, 2.0, -1e30])
    assert draws(SamplingConfig(temperature=1e-38), logits)[1] == 1


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0)]
)
def test_sampling_config_impossible_value_raises(no_type_hook, name, value):
    with pytest.raises(ValueError, match=name):
        SamplingConfig(**{name: value})


def test_export_loads_back_and_evaluates_the_same(run_dir, exported, loaded):
    directory, _ = exported
    model, variables, tokenizer = load_run(directory)
    assert "packed" in variables
    store = open_store(run_dir / "data")
    assert evaluate(model, variables, store).val_loss == last_eval(run_dir)["val_loss"]
    assert tokenizer.decode(tokenizer.encode("the tile")) == "the tile"


@pytest.mark.slow
def test_what_trained_on_kernels_by_name_is_served_without_them(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    tree = json.loads(path.read_text())
    tree["model"] |= {"attention": "cudnn", "implementation": "mosaic_gpu"}
    path.write_text(json.dumps(tree))
    model, variables, _ = load_run(tmp_path / "model")
    assert (model.config.attention, model.config.implementation) == ("auto", None)
    tokens = jnp.arange(9)[None]
    other, same, _ = load_run(exported[0])
    np.testing.assert_array_equal(
        model.apply(variables, tokens)[0], other.apply(same, tokens)[0]
    )


def test_export_bytes_are_two_bits_a_weight_and_scales(exported, loaded):
    directory, sizes = exported
    model = loaded[0]
    weights = 2 * model.config.d_model * 4 * model.config.d_model
    assert sizes["ffn_float32"] == 4 * weights
    assert sizes["ffn_packed"] == weights // 4 + 2 * 2 * model.config.num_tiles
    with safe_open(directory / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        metadata = file.metadata()
    assert metadata["format"] == "trix-ternary-2bit"
    assert not any(name.endswith("tiles.up.kernel") for name in names)


@pytest.mark.slow
def test_export_all_ffn_kinds_load_back_bit_for_bit(tmp_path, loaded):
    tokenizer = loaded[2]
    own = {"reads": "own", "tiles_per_token": 2, "grid_size": 2}
    real = {"ternary": TernaryConfig(mode="none")}
    kinds = (("hierarchical", {}), ("lookup", {}), ("dense", {}), ("lookup", own))
    kinds += (("sparse", real), ("lookup", {"ternary_splines": False}))
    for number, (kind, more) in enumerate(kinds):
        few = {"num_tiles": 4, "tiles_per_cluster": 2, "tiles_per_token": 1}
        config = dataclasses.replace(loaded[0].config, ffn=kind, **few | more)
        model = trix_jax.TransformerLM(config)
        tokens = jnp.arange(12, dtype=jnp.int32)[None]
        variables = model.init(jax.random.key(1), tokens)
        export(model, variables, tokenizer, tmp_path / str(number))
        again, packed, _ = load_run(tmp_path / str(number))
        expected = jax.jit(model.apply)(variables, tokens)[0]
        np.testing.assert_array_equal(jax.jit(again.apply)(packed, tokens)[0], expected)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_load_run_damaged_export_file_raises_naming_it(
    exported, tmp_path, name, damage
):
    import shutil

    shutil.copytree(exported[0], tmp_path / "model")
    path = tmp_path / "model" / name
    data = {"truncated": path.read_bytes()[:-9], "empty": b"", "text": b"hello"}
    path.write_bytes(data[damage])
    with pytest.raises(ValueError, match=name):
        load_run(tmp_path / "model")


def test_load_run_export_with_the_unused_code_is_refused(exported, tmp_path):
    import shutil

    shutil.copytree(exported[0], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file_bf16(path)
    name = next(name for name in tensors if name.endswith("up.bits"))
    tensors[name] = tensors[name] | np.uint8(3)
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="code 11"):
        load_run(tmp_path / "model")


def load_file_bf16(path):
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_open_run_data_of_another_tokenizer_is_refused(run_dir, tmp_path):
    from trix_jax.lm.data import DataConfig, prepare

    (tmp_path / "a.txt").write_text("some other text, written with other letters " * 9)
    config = DataConfig(source="text", path=str(tmp_path / "a.txt"), tokenizer="byte")
    prepare(config, tmp_path / "store", lambda _: None)
    with pytest.raises(ValueError, match="another tokenizer"):
        open_run_data(run_dir, tmp_path / "store")


@pytest.mark.slow
def test_an_export_does_not_depend_on_the_layout_that_kernels_want(monkeypatch):
    model = TransformerLM(
        TransformerConfig(vocab_size=8, context=4, d_model=128, n_layers=1, num_tiles=4)
    )
    tokens = jnp.zeros((1, 4), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    rows, columns = safetensors.to_tensors(model, freeze(model, variables, tokens))
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")
    frozen = freeze(model, variables, tokens)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(frozen["packed"])}
    assert np.dtype("uint16") in kinds
    assert np.dtype("uint8") not in kinds
    planar, same_columns = safetensors.to_tensors(model, frozen)
    assert planar.keys() == rows.keys()
    assert same_columns == columns
    for name, value in rows.items():
        np.testing.assert_array_equal(planar[name], value)
    back = safetensors.from_tensors(model, planar)
    for a, b in zip(
        jax.tree.leaves(back["packed"]), jax.tree.leaves(frozen["packed"]), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_data_that_were_made_again_since_are_no_longer_the_runs_own(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    manifest = json.loads((run / "data" / "manifest.json").read_text())
    store = open_run_data(run)._replace(manifest={**manifest, "fingerprint": "0"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "open_store", lambda _: store)
        with pytest.raises(ValueError, match="it is another store, or was made again"):
            open_run_data(run)
        assert open_run_data(run, run / "data") is store


def test_the_folder_of_a_run_is_refused_and_another_is_not(run_dir, tmp_path):
    with pytest.raises(ValueError, match="a folder of its own, not that of a run"):
        check_output(run_dir)
    check_output(tmp_path)


@pytest.mark.slow
def test_export_into_a_run_and_a_step_of_an_export_are_refused(
    run_dir, exported, capsys
):
    of_run = ["--checkpoint", str(run_dir)]
    for argv in (
        ["export", *of_run, "--output", str(run_dir)],
        ["inspect", *of_run, "--freeze", str(run_dir)],
    ):
        assert main(argv) == 2
        assert "a folder of its own" in capsys.readouterr().err
    assert not (run_dir / "model.safetensors").exists()
    with pytest.raises(ValueError, match="has no steps"):
        load_run(exported[0], "best")


def test_card_of_an_earlier_step_tells_its_own_steps_and_tokens(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    about, last = (_about(run_dir, step) for step in (5, 10))
    assert (about["steps"], about["tokens"] * 2) == (5, summary["tokens"])
    assert about["seconds"] < last["seconds"] <= summary["seconds"]
    same = about.keys() - {"seconds"}
    assert {name: last[name] for name in same} == {name: summary[name] for name in same}


def test_a_run_that_went_on_with_another_store_is_of_that_one(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    other = shutil.copytree(run / "data", tmp_path / "store")
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["path"] = str(other)
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    assert open_run_data(run).directory == other
    shutil.rmtree(other)
    assert open_run_data(run).directory == run / "data"
