"""Every public layer and block by name, with what tests of all of them share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import (
    HierarchicalTriXBlock,
    HierarchicalTriXFFN,
    SparseLookupBlock,
    SparseLookupFFN,
    SparseTriXBlock,
    SparseTriXFFN,
    TriXLinear,
)
from trix_jax.nn import CausalSelfAttention, DenseBlock, DenseFFN

D, EPS = 8, np.finfo(np.float32).eps
INTS = np.random.default_rng(0).integers(-3, 4, (2, 6, D))
X = jnp.asarray(INTS, jnp.float32)
TILES = {"num_tiles": 4, "tiles_per_cluster": 2}
LAYERS = {
    "linear": TriXLinear(D, num_tiles=2, use_bias=True),
    "sparse": SparseTriXFFN(D, tiles_per_token=2, residual=True),
    "hierarchical": HierarchicalTriXFFN(D, tiles_per_token=2, residual=True, **TILES),
    "lookup": SparseLookupFFN(D, grid_size=2, **TILES),
    "dense": DenseFFN(D, 12),
}
BLOCKS = {
    "attention": CausalSelfAttention(D, 2),
    "sparse_block": SparseTriXBlock(D, 2, shared_width=3),
    "hierarchical_block": HierarchicalTriXBlock(D, 2, **TILES),
    "lookup_block": SparseLookupBlock(D, 2, grid_size=2, **TILES),
    "dense_block": DenseBlock(D, 2, width=12),
}
MODULES = LAYERS | BLOCKS
every_module = pytest.mark.parametrize("name", MODULES)
# One layer by default; what is compiled for each takes seconds.
most_modules = pytest.mark.parametrize(
    "name",
    [n if n == "sparse" else pytest.param(n, marks=pytest.mark.slow) for n in MODULES],
)


def output(returned):
    return returned if isinstance(returned, jax.Array) else returned[0]


@functools.cache
def variables_of(name):
    return jax.jit(MODULES[name].init)(jax.random.key(0), X)


@functools.cache
def shapes_of(name):
    """Of its variables, which need no compilation."""
    return jax.eval_shape(MODULES[name].init, jax.random.key(0), X)


@functools.cache
def plain(name):
    """What the layer computes from `X`."""
    call = jax.jit(lambda v, x: output(MODULES[name].apply(v, x)))
    return np.asarray(call(variables_of(name), X))


def assert_same(y, expected):
    # A token may sit in another row of a product, whose sums are then added otherwise:
    # six sums in a row, of at most 4 D terms.
    assert y.shape == expected.shape
    bound = 24 * D * EPS * np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound)
