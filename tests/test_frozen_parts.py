"""What `freeze` leaves as it is, and what it leaves away."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from optimized import jit

from trix_jax import (
    RoutingConfig,
    SparseLookupFFN,
    SparseTriXFFN,
    TernaryConfig,
    freeze,
)

D = 256
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, D)), jnp.float32)


class Mixed(nn.Module):
    """One layer of real weights and one of ternary ones."""

    @nn.compact
    def __call__(self, x):
        real = TernaryConfig(mode="none")
        y, *_ = SparseTriXFFN(D, num_tiles=4, ternary=real, name="real")(x)
        z, *_ = SparseTriXFFN(D, num_tiles=4, name="ternary")(y)
        own = {"reads": "own", "grid_size": 2, "ternary": real, "num_tiles": 8}
        return SparseLookupFFN(D, name="lookup", **own)(z)[0]


def test_real_weights_stay_beside_those_that_are_packed():
    variables = jax.jit(Mixed().init)(jax.random.key(0), X)
    packed = freeze(Mixed(), variables, X)
    assert packed["packed"].keys() == {"ternary", "lookup"}
    assert packed["packed"]["lookup"].keys() == {"splines"}
    assert packed["params"]["real"] == variables["params"]["real"]
    call = jit(Mixed().apply)
    np.testing.assert_array_equal(call(packed, X), call(variables, X))


def test_frozen_tiles_by_a_hash_keep_no_sums_and_need_no_state():
    layer = SparseTriXFFN(D, num_tiles=8, routing=RoutingConfig(source="hash"))
    ids = jnp.arange(X.shape[0] * X.shape[1]).reshape(X.shape[:-1])
    variables = jax.jit(layer.init)(jax.random.key(0), X, token_ids=ids)
    packed = freeze(layer, variables, X, token_ids=ids)
    assert packed["packed"]["tiles"].keys() == {"up", "down"}
    alone = {name: packed[name] for name in ("params", "packed")}
    call = jit(lambda v: layer.apply(v, X, token_ids=ids)[0])
    np.testing.assert_array_equal(call(alone), call(variables))
