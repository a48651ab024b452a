"""Adopted PyTorch layers: ours, with their weights, scales, signatures and clusters."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import freeze, routing
from trix_jax.interop import from_torch
from trix_jax.interop.adopt import adopt
from trix_jax.ternary import round_scale

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = {"linear": {"num_tiles": 4}, "hierarchical_top2": {"top_k_clusters": 2}}
FFNS = ["sparse", "hierarchical", "hierarchical_top2", "lookup", "lookup_float"]


def read(kind):
    """The layer, with scales that bfloat16 holds: rounding them is the one thing left
    out here.
    """
    imported = from_torch.read(GOLDEN / f"{kind}.safetensors", **SETTINGS.get(kind, {}))
    arrays = {
        name: round_scale(value) if "scale" in name else value
        for name, value in imported.arrays.items()
        if not name.startswith("golden.")
    }
    if "tiles.output_scale" in arrays:  # it is folded into the down scale, one rounding
        arrays["tiles.output_scale"] = jnp.ones_like(arrays["tiles.output_scale"])
    return imported._replace(arrays=arrays), imported.arrays["golden.x"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FFNS)
def test_adopted_ffn_equals_the_original(kind):
    imported, x = read(kind)
    wanted, tiles = from_torch.apply(imported, x)
    layer, variables = adopt(imported)
    y, info, _ = jax.jit(layer.apply)(variables, x)
    np.testing.assert_array_equal(info.tiles[:, 0], tiles)
    # The norms' epsilons (1e-6 for 1e-5, relative to a variance of about 1) and the
    # tanh form of GELU (within 5e-4) move the place on a spline of slopes up to 4 a
    # unit.
    bound = 5e-3 if "lookup" in kind else 1e-5
    np.testing.assert_allclose(y, wanted, rtol=0, atol=bound * np.abs(wanted).max())


def test_adopted_linear_equals_the_original():
    imported, x = read("linear")
    layer, variables = adopt(imported)
    wanted = from_torch.apply(imported, x)
    np.testing.assert_allclose(layer.apply(variables, x), wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_adopted_ffn_trains_and_packs():
    imported, x = read("hierarchical")
    layer, variables = adopt(imported)
    init = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, init) == jax.tree.map(jnp.shape, variables)
    state = routing.freeze_routing(variables["routing"], False)

    def loss(params):
        (y, _, aux), new = layer.apply(
            {"params": params, "routing": state}, x, train=True, mutable=["routing"]
        )
        return jnp.mean((y - jnp.sin(x)) ** 2) + aux["total_aux"], new["routing"]

    grads, reported = jax.grad(loss, has_aux=True)(variables["params"])
    for leaf in jax.tree.leaves(grads):
        assert np.abs(leaf).max() > 0
    moved = routing.update(reported)["tiles"]["router"]["bias"]
    assert np.abs(moved).max() > 0
    packed = freeze(layer, variables, x)
    np.testing.assert_array_equal(
        layer.apply(packed, x)[0], layer.apply(variables, x)[0]
    )


def test_language_model_is_not_adopted():
    imported = from_torch.read(GOLDEN / "lm.safetensors")
    with pytest.raises(ValueError, match="Got 'lm'"):
        adopt(imported)
