"""Tiles by a hash are called as `nn.Dense` is: no state is needed, in training, evaluation,
frozen or lifted.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from trix_jax import RoutingConfig, SparseTriXFFN, freeze

D = 16
HASH = RoutingConfig(source="hash")
X = jax.random.normal(jax.random.key(0), (6, D))
IDS = jnp.arange(6)
LAYER = SparseTriXFFN(D, num_tiles=4, tiles_per_token=2, routing=HASH)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(LAYER.init)(jax.random.key(1), X, token_ids=IDS)


def test_parameters_alone_give_the_numbers_and_gradients_of_all_variables(variables):
    def loss(params, more, train):
        how = {"mutable": ["routing"]} if train else {}
        out = LAYER.apply({"params": params, **more}, X, train, token_ids=IDS, **how)
        return ((out[0] if train else out)[0] ** 2).sum()

    state = {"routing": variables["routing"]}
    for train in (False, True):
        of = jax.jit(jax.value_and_grad(loss), static_argnums=2)
        alone, whole = (of(variables["params"], more, train) for more in ({}, state))
        jax.tree.map(np.testing.assert_array_equal, alone, whole)


@pytest.mark.slow
def test_training_without_state_warns_of_nothing_and_leaves_it_as_it_is(
    variables, recwarn
):
    params = {"params": variables["params"]}
    LAYER.apply(params, X, True, token_ids=IDS)
    assert not recwarn.list
    _, new = LAYER.apply(variables, X, True, token_ids=IDS, mutable=["routing"])
    jax.tree.map(np.testing.assert_array_equal, new["routing"], variables["routing"])


@pytest.mark.slow
def test_frozen_parameters_alone_serve(variables):
    frozen = freeze(LAYER, {"params": variables["params"]}, X, token_ids=IDS)
    assert sorted(frozen) == ["packed", "params"]
    call = jax.jit(LAYER.apply)
    expected = call(variables, X, token_ids=IDS)[0]
    np.testing.assert_array_equal(call(frozen, X, token_ids=IDS)[0], expected)


class Step(nn.Module):
    routing: RoutingConfig = HASH

    @nn.compact
    def __call__(self, x, ids):
        kwargs = {"num_tiles": 4, "tiles_per_token": 2, "routing": self.routing}
        return x + SparseTriXFFN(D, **kwargs)(x, token_ids=ids)[0], None


def scanned(routing):
    lifted = nn.scan(
        Step,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=3,
    )
    return lifted(routing)


def test_scan_over_layers_needs_the_axis_of_parameters_alone():
    model = scanned(HASH)
    variables = jax.jit(model.init)(jax.random.key(0), X, IDS)
    assert sorted(variables) == ["params"]
    assert jax.jit(model.apply)(variables, X, IDS)[0].shape == X.shape


def test_scan_over_layers_that_read_says_which_axis_is_missing():
    with pytest.raises(
        ValueError, match=r"variable_axes=\{'params': 0, 'routing': 0\}"
    ):
        jax.eval_shape(scanned(RoutingConfig()).init, jax.random.key(0), X, IDS)
