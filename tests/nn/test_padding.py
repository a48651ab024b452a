"""Masked tokens change nothing for the others: a padded batch has the outputs, losses,
counts and next state of the batch without padding, whatever the padding holds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import (
    HierarchicalTriXBlock,
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseLookupFFN,
    SparseTriXFFN,
    TransformerConfig,
    TransformerLM,
    freeze,
    routing,
)
from trix_jax.nn import CausalSelfAttention

D, EPS = 16, np.finfo(np.float32).eps
X = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, D)))
LAYERS = {
    "sparse": SparseTriXFFN(D, num_tiles=4, tiles_per_token=2, residual=True),
    "hierarchical": HierarchicalTriXFFN(D, num_tiles=8, tiles_per_cluster=2),
    "lookup": SparseLookupFFN(D, num_tiles=4, tiles_per_cluster=2, grid_size=2),
    "block": HierarchicalTriXBlock(D, 2, num_tiles=8, tiles_per_cluster=2),
    "softmax": SparseTriXFFN(D, routing=RoutingConfig(gate="softmax")),
}
most_layers = pytest.mark.parametrize(
    "name",
    [n if n == "sparse" else pytest.param(n, marks=pytest.mark.slow) for n in LAYERS],
)
left_and_right = pytest.mark.parametrize(
    "side", ["left", pytest.param("right", marks=pytest.mark.slow)]
)


def padded(side, value=np.nan, length=9):
    """The batch with `value` on one side, and its mask."""
    start = length - X.shape[1] if side == "left" else 0
    real = slice(start, start + X.shape[1])
    x, mask = np.full((2, length, D), value, np.float32), np.zeros((2, length), bool)
    x[:, real], mask[:, real] = X, True
    return x, mask, real


@functools.cache
def variables_of(name):
    return jax.jit(LAYERS[name].init)(jax.random.key(1), X)


def training_call(name):
    """Output, info, losses, next state, gradients."""
    layer, variables = LAYERS[name], variables_of(name)

    def loss(params, x, mask):
        call = {"params": params, "routing": variables["routing"]}
        how = {"mask": mask, "mutable": ["routing"]}
        (y, info, aux), new = layer.apply(call, x, True, **how)
        real = y if mask is None else jnp.where(mask[..., None], y, 0)
        total = jnp.sum(real**2) + aux["total_aux"]
        return total, (y, info, aux, routing.update(new["routing"]))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    return lambda x, mask=None: gradient(variables["params"], x, mask)


def assert_near(got, expected, roundings=256):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.float64(a), np.float64(b)
        bound = roundings * EPS * max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


@most_layers
@left_and_right
def test_padding_of_nan_changes_no_output_loss_count_state_or_gradient(name, side):
    x, mask, real = padded(side)
    call = training_call(name)
    (grads, dx), (y, info, aux, state) = call(x, mask)
    (plain_grads, plain_dx), (plain_y, plain_info, plain_aux, plain_state) = call(X)
    assert_near(y[:, real], plain_y)
    assert_near(dx[:, real], plain_dx)
    np.testing.assert_array_equal(np.where(mask[..., None], 0, dx), 0)
    assert_near(grads, plain_grads)
    assert_near(aux, plain_aux)
    assert_near(state, plain_state)
    np.testing.assert_array_equal(info.tiles[:, real], plain_info.tiles)
    np.testing.assert_array_equal(info.counts, plain_info.counts)
    assert (np.asarray(info.tiles)[~mask] == -1).all()
    assert (np.asarray(info.gates)[~mask] == 0).all()
    for field in ("entropy", "max_load", "dead_tiles", "tie_rate"):
        assert_near(getattr(info, field), getattr(plain_info, field))


@pytest.mark.slow
@most_layers
def test_evaluation_and_frozen_variables_leave_padding_out(name):
    layer, variables = LAYERS[name], variables_of(name)
    x, mask, real = padded("left", value=7.0)
    packed = freeze(layer, variables, X)
    call = jax.jit(lambda v, x, mask=None: layer.apply(v, x, mask=mask))
    expected, plain_info, _ = call(variables, X)
    for given in (variables, packed):
        y, info, _ = call(given, x, mask)
        assert_near(y[:, real], expected)
        np.testing.assert_array_equal(info.counts, plain_info.counts)
        if name in ("hierarchical", "lookup"):  # neither residual nor attention
            np.testing.assert_array_equal(np.asarray(y)[~mask], 0)


@pytest.mark.slow
def test_a_mask_of_real_tokens_alone_changes_nothing_and_of_none_gives_zeros():
    call = training_call("hierarchical")
    expected = call(X)
    assert_near(call(X, np.ones((2, 5), bool)), expected)
    grads, (y, info, aux, _) = call(X, np.zeros((2, 5), bool))
    np.testing.assert_array_equal(y, 0)
    assert info.counts.sum() == 0
    assert aux["balance"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((grads, aux)))


def test_nan_in_a_real_token_shows_in_its_output_and_the_losses():
    x, mask, _ = padded("right", value=0.0)
    x[1, 2] = np.nan
    _, (y, _, aux, _) = training_call("sparse")(x, mask)
    bad = ~np.isfinite(y).all(axis=-1)
    assert bad[1, 2]
    assert bad.sum() == 1
    assert np.isnan(aux["total_aux"])


TOKENS = np.asarray([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])


@pytest.mark.slow
@left_and_right
@pytest.mark.parametrize(
    "router_input", ["embedding", pytest.param("hidden", marks=pytest.mark.slow)]
)
def test_language_model_gives_real_tokens_the_logits_without_padding(
    side, router_input
):
    sizes = {"vocab_size": 7, "context": 9, "d_model": D, "n_layers": 2, "n_heads": 2}
    tiles = {"num_tiles": 4, "tiles_per_cluster": 2, "router_input": router_input}
    model = TransformerLM(TransformerConfig(**sizes, **tiles))
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    _, mask, real = padded(side)
    tokens = np.zeros(mask.shape, int)
    tokens[:, real] = TOKENS
    call = jax.jit(lambda tokens, mask=None: model.apply(variables, tokens, mask=mask))
    logits, infos, aux = call(tokens, mask)
    expected, plain_infos, plain_aux = call(TOKENS)
    assert_near(logits[:, real], expected)
    assert_near(aux, plain_aux)
    for info, plain in zip(infos, plain_infos, strict=True):
        np.testing.assert_array_equal(info.counts, plain.counts)


def test_attention_sees_its_own_segment_alone():
    layer = CausalSelfAttention(D, 2)
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    both = np.concatenate([X[:1], X[1:]], axis=1)
    ids = np.repeat([[0, 1]], 5, axis=1)
    call = jax.jit(lambda x, ids=None: layer.apply(variables, x, segment_ids=ids))
    assert_near(call(both, ids).reshape(2, 5, D), call(X))
