"""Labels for optimizers: each parameter's word, and the mask that the training lane has."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from trix_jax import (
    SparseTriXFFN,
    TransformerConfig,
    TransformerLM,
    TriXLinear,
    optimizer_labels,
)
from trix_jax.interop.nnx import Layer
from trix_jax.lm.train.optimizer import decay_mask

SIZES = {"vocab_size": 7, "context": 4, "d_model": 8, "n_layers": 1, "n_heads": 2}


def parameters(ffn, **more):
    tiles = {"num_tiles": 4, "tiles_per_cluster": 2, "grid_size": 2, **more}
    model = TransformerLM(TransformerConfig(ffn=ffn, **SIZES, **tiles))
    tokens = jnp.zeros((1, 4), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]


def test_every_parameter_has_its_word():
    found = flatten_dict(optimizer_labels(parameters("hierarchical")), sep="/")
    ternary = {f"block_00/ffn/tiles/{end}/kernel" for end in ("up", "down")}
    kernels = {f"block_00/attention/{end}/kernel" for end in ("qkv", "out")}
    assert {path for path, word in found.items() if word == "ternary"} == ternary
    assert {path for path, word in found.items() if word == "kernel"} == kernels
    assert {found[path] for path in found.keys() - ternary - kernels} == {"other"}
    own = flatten_dict(optimizer_labels(parameters("lookup", reads="own")), sep="/")
    ternary = {f"block_00/ffn/{end}/kernel" for end in ("tile_read", "tile_write")}
    assert {path for path, word in own.items() if word == "ternary"} == ternary
    linear = jax.eval_shape(TriXLinear(8).init, jax.random.key(0), jnp.zeros((1, 8)))
    assert jax.tree.leaves(optimizer_labels(linear["params"])) == ["ternary"]


def test_what_is_not_other_is_what_the_training_lane_decays():
    for ffn in ("sparse", "hierarchical", "lookup", "dense"):
        params = parameters(ffn)
        labels = optimizer_labels(params)
        assert jax.tree.map(lambda word: word != "other", labels) == decay_mask(params)


def test_nnx_parameters_have_the_words_of_linen_ones():
    linear = nnx.eval_shape(lambda: nnx.Linear(8, 8, rngs=nnx.Rngs(0)))
    layer = nnx.eval_shape(
        lambda: Layer(SparseTriXFFN(8), jnp.zeros((1, 8)), rngs=nnx.Rngs(0))
    )
    words = nnx.to_pure_dict(optimizer_labels(nnx.state(linear, nnx.Param)))
    assert words == {"kernel": "kernel", "bias": "other"}
    words = nnx.to_pure_dict(optimizer_labels(nnx.state(layer, nnx.Param)))
    tiles = {"up": {"kernel": "ternary"}, "down": {"kernel": "ternary"}}
    assert words == {"tiles": tiles}


def test_optax_takes_the_labels_of_boxed_parameters():
    params = {"tiles": {"up": {"kernel": nn.Partitioned(jnp.ones((2, 2)), ("a", "b"))}}}
    rates = {"ternary": optax.sgd(1.0), "kernel": optax.sgd(0.0), "other": optax.sgd(0)}
    optimizer = optax.partition(rates, optimizer_labels)
    updates, _ = optimizer.update(params, optimizer.init(params))
    assert (updates["tiles"]["up"]["kernel"].value == -1).all()


def test_a_parameter_called_value_or_alone_has_its_word():
    params = {"value": 0.0, "kernel": {"value": 0.0}, "layer": {"kernel": 0.0}}
    words = {
        "value": "other",
        "kernel": {"value": "other"},
        "layer": {"kernel": "kernel"},
    }
    assert optimizer_labels(params) == words
    assert optimizer_labels(jnp.ones(3)) == "other"
