"""Any config that validates trains: its step is traced, shapes and types through
forward, backward and update.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from trix_jax.cli.main import main
from trix_jax.lm.config import RunConfig, TrainConfig, resolve
from trix_jax.lm.presets import match_width
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.routing import RoutingConfig

small = st.integers(1, 4)
MODELS = {
    "context": st.integers(1, 9),
    "d_model": st.sampled_from([1, 2, 3, 4, 8, 12]),
    "n_layers": st.integers(1, 2),
    "n_heads": small,
    "ffn": st.sampled_from(["sparse", "hierarchical", "lookup", "dense"]),
    "ffn_width": st.sampled_from([None, 1, 5, "match-params"]),
    "expansion": small,
    "num_tiles": st.integers(1, 8),
    "tiles_per_cluster": small,
    "top_k_clusters": small,
    "tiles_per_token": small,
    "shared_width": st.sampled_from([0, 3]),
    "grid_size": small,
    "compress_hidden": st.sampled_from([None, 0, 1, 3]),
    "ternary_splines": st.booleans(),
    "reads": st.sampled_from(["shared", "own"]),
    "activation": st.sampled_from([None, "gelu", "relu2"]),
    "dropout": st.sampled_from([0.0, 0.5]),
    "tied": st.booleans(),
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "routing": st.builds(
        RoutingConfig,
        source=st.sampled_from(["weights", "random", "learned", "hash"]),
        signature=st.sampled_from(["sum", "sign"]),
        gate=st.sampled_from(["none", "sigmoid", "softmax", "renormalized"]),
        score_scale=st.sampled_from([0.5, 3.0]),
    ),
}
TRAINS = {
    "steps": small,
    "batch_size": small,
    "accumulate": small,
    "warmup_steps": st.integers(0, 9),
    "clip": st.sampled_from([0.0, 1.0]),
    "weight_decay": st.sampled_from([0.0, 0.1]),
    "final_learning_rate": st.sampled_from([0.0, 1.0]),
}


def built(kind, values):
    """The config, or None where it does not validate."""
    try:
        return kind(**values)
    except ValueError:
        return None


@pytest.mark.slow
# Most combinations do not validate, by design: that is the filter.
@settings(max_examples=40, suppress_health_check=[HealthCheck.filter_too_much])
@given(model=st.fixed_dictionaries(MODELS), train=st.fixed_dictionaries(TRAINS))
def test_any_config_that_validates_trains(model, train):
    model, train = built(TransformerConfig, model), built(TrainConfig, train)
    assume(model is not None and train is not None)
    model = match_width(model, dataclasses.replace(model, ffn_width=None))
    model = resolve(RunConfig(model=model, train=train), 7).model
    lm, optimizer = TransformerLM(model), make_optimizer(train)
    state = jax.eval_shape(lambda: init_state(lm, optimizer, 0))
    rows = train.batch_size // train.accumulate
    batch = jax.ShapeDtypeStruct((train.accumulate, rows, model.context + 1), jnp.int32)
    new, values = jax.eval_shape(make_train_step(lm, optimizer, train), state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert values.loss.shape == ()


@pytest.mark.slow
def test_a_process_of_doubles_trains_exports_and_generates(
    tiny_config, one_device, tmp_path, capsys
):
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    prompt = ["--prompt", "the", "--tokens", "12", "--json"]
    with jax.enable_x64(True):
        train(tiny_config, run, devices=one_device, report=lambda _: None)
        for argv in (
            ["export", "--checkpoint", run, "--output", out],
            ["eval", "--checkpoint", out, "--data", f"{run}/data"],
            ["generate", "--checkpoint", out, *prompt],
        ):
            assert main(argv) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert main(["generate", "--checkpoint", out, *prompt]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == said
