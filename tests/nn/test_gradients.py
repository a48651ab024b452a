"""Gradients against central differences, where a layer is smooth: real or soft weights,
and routes that the small step does not change. (Straight-through gradients are not
derivatives; `test_ternary.py` holds those to their own formula.)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import (
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseLookupFFN,
    SparseTriXFFN,
    TernaryConfig,
)

D, STEP = 8, 2.0**-9

# Scales take no gradient, so that soft weights have a derivative under "fixed" only.
REAL, SOFT = TernaryConfig(mode="none"), TernaryConfig(mode="soft", rule="fixed")
LOSSES = {"balance_weight": 1.0, "diversity_weight": 1.0}
LAYERS = {
    "sparse": SparseTriXFFN(
        D, tiles_per_token=2, activation="gelu", ternary=REAL, routing=RoutingConfig()
    ),
    "soft": SparseTriXFFN(
        D,
        tiles_per_token=2,
        activation="silu",
        ternary=SOFT,
        routing=RoutingConfig(gate="renormalized", **LOSSES),
    ),
    "hierarchical": HierarchicalTriXFFN(
        D,
        num_tiles=4,
        tiles_per_cluster=2,
        activation="relu2",
        ternary=REAL,
        routing=RoutingConfig(gate="softmax", **LOSSES),
    ),
    "lookup": SparseLookupFFN(
        D,
        num_tiles=4,
        tiles_per_cluster=2,
        grid_size=1,  # splines jump from cell to cell
        ternary_splines=False,
        routing=RoutingConfig(**LOSSES),
    ),
    "lookup_own": SparseLookupFFN(
        D,
        num_tiles=8,
        tiles_per_cluster=4,
        tiles_per_token=2,
        grid_size=1,
        ternary_splines=False,
        reads="own",
        ternary=REAL,
        routing=RoutingConfig(**LOSSES),
    ),
}
SEEDS = {"lookup_own": 6}  # of inputs whose routes the step leaves


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradient_of_every_leaf_is_the_central_difference(name):
    layer, chance = LAYERS[name], np.random.default_rng(SEEDS.get(name, 0))
    x, dy = jnp.asarray(chance.normal(size=(2, 16, D)), jnp.float32)
    variables = layer.init(jax.random.key(0), x)
    state = variables["routing"]

    def outputs(inputs):
        params, x = inputs
        y, info, aux = layer.apply({"params": params, "routing": state}, x)
        return y * dy, aux["total_aux"], info.tiles

    def total(inputs):
        terms, aux, _ = outputs(inputs)
        return terms.sum() + aux

    value = jax.jit(outputs)
    inputs = (variables["params"], x)
    leaves, treedef = jax.tree.flatten(inputs)
    names = [jax.tree_util.keystr(k) for k, _ in jax.tree.leaves_with_path(inputs)]
    tiles = value(inputs)[2]
    grads = jax.tree.leaves(jax.jit(jax.grad(total))(inputs))
    for i, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
        along = np.sign(np.asarray(grad))  # so that no part cancels another
        ends = []
        for sign in (1, -1):
            moved = [*leaves[:i], leaf + sign * STEP * along, *leaves[i + 1 :]]
            terms, aux, found = value(treedef.unflatten(moved))
            np.testing.assert_array_equal(found, tiles, err_msg=names[i])
            ends.append(np.float64(terms).sum() + np.float64(aux))
        slope = (ends[0] - ends[1]) / (2 * STEP)
        expected = np.abs(np.float64(grad)).sum()
        assert expected > 1e-3, names[i]
        np.testing.assert_allclose(slope, expected, rtol=0.01, err_msg=names[i])
