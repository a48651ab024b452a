"""The dense part beside tiles: what it adds, what it costs, and that it is served."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import SparseTriXBlock, freeze
from trix_jax.interop.safetensors import from_tensors, to_tensors
from trix_jax.lm.accounting import active_width, costs
from trix_jax.lm.data.tokenizer import CharTokenizer
from trix_jax.lm.serve.export import export
from trix_jax.nn import DenseFFN
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

D, WIDTH = 8, 3
CONFIG = TransformerConfig(
    vocab_size=11,
    context=6,
    d_model=D,
    n_layers=2,
    n_heads=2,
    ffn="sparse",
    num_tiles=4,
    expansion=4,
    tiles_per_token=2,
    shared_width=WIDTH,
)


def test_it_adds_a_dense_ffn_of_the_same_input():
    x = jax.random.normal(jax.random.key(0), (2, 5, D))
    block = SparseTriXBlock(D, 2, shared_width=WIDTH)
    variables = jax.jit(block.init)(jax.random.key(1), x)
    shared = variables["params"]["shared"]
    rest = {k: v for k, v in variables["params"].items() if k != "shared"}
    bare = SparseTriXBlock(D, 2)
    call = functools.partial(
        bare.apply, capture_intermediates=True, mutable="intermediates"
    )
    y, state = jax.jit(call)({**variables, "params": rest}, x)
    h = state["intermediates"]["ffn_norm"]["__call__"][0]
    added = DenseFFN(D, WIDTH).apply({"params": shared}, h)[0]
    whole = jax.jit(block.apply)(variables, x)[0]
    np.testing.assert_allclose(whole, y[0] + added, atol=1e-6)
    assert jnp.abs(added).max() > 0.01


def test_its_costs_are_those_counted_by_hand():
    bare = costs(dataclasses.replace(CONFIG, shared_width=0))
    whole = costs(CONFIG)
    weights = CONFIG.n_layers * 2 * D * WIDTH
    assert whole.total - bare.total == whole.ffn - bare.ffn == weights
    assert whole.ffn_active - bare.ffn_active == weights
    assert whole.ffn_active_training - bare.ffn_active_training == weights
    assert whole.ffn_bits - bare.ffn_bits == 16 * weights
    assert whole.routing_bits == bare.routing_bits
    # Two tiles of eight, four scores of D products (half a width each), and it.
    assert active_width(CONFIG) == 2 * 8 + 4 / 2 + WIDTH


@pytest.mark.slow
def test_it_is_drawn_as_the_twin_is_and_served_as_it_is():
    model, tokens = TransformerLM(CONFIG), jnp.arange(6)[None]
    variables = jax.jit(model.init)(jax.random.key(2), tokens)
    shared = variables["params"]["block_01"]["shared"]
    assert jnp.std(shared["up"]["kernel"]) == pytest.approx(0.02, rel=0.5)
    assert jnp.std(shared["down"]["kernel"]) == pytest.approx(0.01, rel=0.5)
    logits = model.apply(variables, tokens)[0]
    frozen = freeze(model, variables, tokens)
    np.testing.assert_allclose(model.apply(frozen, tokens)[0], logits, atol=1e-5)
    tensors, _ = to_tensors(model, frozen)
    again = from_tensors(model, tensors)
    np.testing.assert_array_equal(
        model.apply(again, tokens)[0], model.apply(frozen, tokens)[0]
    )
    without = {**variables["params"]["block_01"]}
    without["shared"] = jax.tree.map(jnp.zeros_like, shared)
    params = {**variables["params"], "block_01": without}
    changed = model.apply({**variables, "params": params}, tokens)[0]
    assert jnp.abs(changed - logits).max() > 1e-5


def test_a_width_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"shared_width must be at least 0. Got -1\."):
        dataclasses.replace(CONFIG, shared_width=-1)


@pytest.mark.slow
def test_an_export_counts_it_on_both_sides(tmp_path):
    model, tokens = TransformerLM(CONFIG), jnp.arange(6)[None]
    variables = jax.jit(model.init)(jax.random.key(2), tokens)
    text = "abcdefghijk"
    sizes = export(model, variables, CharTokenizer(text), tmp_path)
    bare = TransformerLM(dataclasses.replace(CONFIG, shared_width=0))
    less_of = jax.jit(bare.init)(jax.random.key(2), tokens)
    less = export(bare, less_of, CharTokenizer(text), tmp_path)
    held = 4 * CONFIG.n_layers * 2 * D * WIDTH  # bytes, as float32
    assert sizes["ffn_float32"] - less["ffn_float32"] == held
    assert sizes["ffn_packed"] - less["ffn_packed"] == held
