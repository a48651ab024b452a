"""What every layer must do: initialization, shapes, dtypes, training against
evaluation, refusals.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from trix_jax import HierarchicalTriXFFN, SparseLookupFFN, SparseTriXFFN, TriXLinear

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.

D = 16
EPS = np.finfo(np.float32).eps

# Initialization --------------------------------------------------------------------------------------------------------


def test_ffn_at_initialization_changes_its_input_and_moves_every_parameter(ffn):
    gradients, y = ffn.task_gradient()(ffn.variables())
    assert 1e-3 < np.abs(y).mean() < 10
    assert np.abs(y - ffn.x).mean() > 1e-2
    for path, gradient in flatten_dict(gradients, sep="/").items():
        assert gradient.dtype == jnp.float32
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-6, path


def test_routing_adds_no_leaf_to_params(ffn):
    variables = ffn.variables()
    assert set(flatten_dict(variables["params"], sep="/")) == ffn.leaves
    assert set(variables) == {"params", "routing"}


# Shapes and dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rank_two_and_three_give_the_same(ffn_kind):
    ffn = ffn_kind
    deep, info, aux = ffn.run()
    flat, flat_info, flat_aux = ffn.run(ffn.x.reshape(-1, D))
    assert deep.shape == ffn.x.shape
    assert info.tiles.shape[:-1] == ffn.x.shape[:-1] == info.gates.shape[:-1]
    bound = 4 * D * EPS * np.abs(flat).max()
    np.testing.assert_allclose(deep.reshape(-1, D), flat, rtol=0, atol=bound)
    np.testing.assert_array_equal(info.counts, flat_info.counts)
    assert aux["total_aux"] == pytest.approx(float(flat_aux["total_aux"]), rel=1e-5)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "dtype", [None, pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_output_has_the_layers_dtype_or_that_of_the_input(ffn, x_dtype, dtype):
    layer = ffn.layer.clone(dtype=dtype and jnp.dtype(dtype))
    out = jax.eval_shape(layer.apply, ffn.variables(), ffn.x.astype(x_dtype))
    assert out[0].dtype == (dtype or x_dtype)
    assert out[0].shape == ffn.x.shape
    assert out[2]["total_aux"].dtype == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtype_none_computes_in_the_dtype_of_the_input(ffn_kind, dtype):
    layer, x = ffn_kind.layer, ffn_kind.x.astype(dtype)
    programs = {
        str(jax.make_jaxpr(layer.clone(dtype=d).apply)(ffn_kind.variables(), x))
        for d in (None, dtype)
    }
    assert len(programs) == 1


@pytest.mark.slow
def test_bfloat16_stays_near_float32_where_the_routes_agree(ffn_kind):
    x = ffn_kind.x.astype(jnp.bfloat16)
    y, info, _ = ffn_kind.run(x)
    whole, whole_info, _ = ffn_kind.run(x.astype(jnp.float32))
    same = (info.tiles == whole_info.tiles).all(axis=-1)
    assert same.mean() > 0.8
    error = np.abs(y.astype(jnp.float32) - whole)[same]
    # Eight bits, on the way through norm, two products, a square and the gate.
    assert error.max() < 16 * 2**-8 * np.abs(whole).max()
    assert error.max() > 0


@pytest.mark.parametrize("shape", [(), (D + 1,), (2, 3, D + 1), (D, 2)])
def test_input_of_another_shape_is_refused(ffn, shape, no_type_hook):
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 16\].* Got \["):
        ffn.layer.apply(ffn.variables(), jnp.zeros(shape))


# Training and evaluation -----------------------------------------------------------------------------------------------


def test_training_drops_outputs_before_the_residual_and_keeps_the_losses(ffn_kind):
    layer = ffn_kind.layer.clone(dropout=0.5, residual=True)
    variables = ffn_kind.variables()
    y, _, aux = ffn_kind.run()
    trained = jax.jit(
        lambda key: layer.apply(
            variables, ffn_kind.x, True, rngs={"dropout": key}, mutable=["routing"]
        )[0]
    )
    out, _, train_aux = trained(jax.random.key(0))
    dropped = np.asarray(out == ffn_kind.x)
    assert 0.3 < dropped.mean() < 0.7
    expected = np.where(dropped, ffn_kind.x, ffn_kind.x + 2 * y)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert (trained(jax.random.key(1))[0] != out).any()
    assert set(train_aux) == set(aux) == {"balance", "diversity", "total_aux"}
    for loss in aux:
        assert aux[loss].shape == ()
        assert train_aux[loss] == pytest.approx(float(aux[loss]), rel=1e-5)
    assert aux["total_aux"] > 0


def test_dropout_leaves_evaluation_alone(ffn_kind):
    layer, variables = ffn_kind.layer, ffn_kind.variables()
    programs = {
        str(jax.make_jaxpr(layer.clone(dropout=rate).apply)(variables, ffn_kind.x))
        for rate in (0.0, 0.5)
    }
    assert len(programs) == 1


# Refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (SparseTriXFFN(D, num_tiles=5), r"num_tiles=5 .* expansion \* d_model=64"),
        (SparseTriXFFN(D, num_tiles=0), "num_tiles=0"),
        (SparseTriXFFN(D, tiles_per_token=5), "tiles_per_token=5 .* num_tiles=4"),
        (SparseTriXFFN(D, tiles_per_token=0), "tiles_per_token=0"),
        (SparseTriXFFN(D, activation="tanh"), "activation must be one of .*'tanh'"),
        (
            HierarchicalTriXFFN(D, num_tiles=6, d_hidden=4, tiles_per_cluster=4),
            "tiles_per_cluster=4 must divide num_tiles=6",
        ),
        (
            HierarchicalTriXFFN(D, num_tiles=6, tiles_per_cluster=3),
            r"num_tiles=6 must divide 4 \* d_model=64",
        ),
        (
            HierarchicalTriXFFN(D, num_tiles=8, tiles_per_cluster=4, top_k_clusters=3),
            "top_k_clusters=3 .* 2 clusters",
        ),
        (
            HierarchicalTriXFFN(D, num_tiles=8, tiles_per_cluster=2, tiles_per_token=3),
            r"tiles_per_token=3 .* top_k_clusters \* tiles_per_cluster=2",
        ),
        (
            SparseLookupFFN(D, num_tiles=6, tiles_per_cluster=4),
            "tiles_per_cluster=4 must divide num_tiles=6",
        ),
        (TriXLinear(10, num_tiles=4), "num_tiles=4 must divide features=10"),
    ],
)
def test_bad_sizes_name_argument_and_value(layer, message, no_type_hook):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 12, D)))


def test_lookup_width_that_four_does_not_divide_is_refused_or_set(no_type_hook):
    small = {"num_tiles": 2, "tiles_per_cluster": 1, "grid_size": 2}
    x = jnp.ones((2, 12, 6))
    with pytest.raises(ValueError, match="4 must divide d_model=6"):
        jax.eval_shape(SparseLookupFFN(6, **small).init, jax.random.key(0), x)
    layer = SparseLookupFFN(6, compress_hidden=2, **small)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
    assert shapes["params"]["compress_in"]["kernel"].shape == (6, 2)
