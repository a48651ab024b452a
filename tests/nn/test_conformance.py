"""Every public layer and block takes what `nn.Dense` takes and goes through what training
code does with a module: each time the numbers are those of the plain call.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from public_layers import (
    BLOCKS,
    INTS,
    LAYERS,
    MODULES,
    D,
    X,
    assert_same,
    most_modules,
    output,
    plain,
    shapes_of,
    variables_of,
)

from trix_jax import (
    TriXLinear,
)

# What `nn.Dense` takes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@most_modules
def test_numpy_and_integers_give_the_numbers_of_floats(name):
    layer, variables = MODULES[name], variables_of(name)
    given = [np.float32(X), np.int8(INTS), jnp.asarray(INTS)]
    outputs = jax.jit(lambda v: [output(layer.apply(v, x)) for x in given])(variables)
    for y in outputs:
        assert y.dtype == jnp.float32
        assert_same(y, plain(name))


@most_modules
def test_numpy_initializes_outside_of_jit(name):
    layer = MODULES[name]
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), np.float32(X)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, shapes_of(name))


@pytest.mark.slow
def test_numpy_initializes_and_runs_without_jit():
    layer, x = LAYERS["sparse"], np.float32(X)
    layer.init(jax.random.key(0), x)
    assert_same(output(layer.apply(variables_of("sparse"), x)), plain("sparse"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        if name == "sparse" or dtype == "bfloat16"
        else pytest.param(name, dtype, marks=pytest.mark.slow)
        for name in MODULES
        for dtype in ("int32", "uint8", "bool", "bfloat16", "float16")
    ],
)
def test_output_has_the_dtype_that_dense_gives_or_that_of_the_input(name, dtype):
    x = jax.ShapeDtypeStruct(X.shape, dtype)
    given = jax.eval_shape(MODULES[name].apply, shapes_of(name), x)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    assert output_type(given) == (dtype if is_float else "float32")
    narrow = MODULES[name].clone(dtype=jnp.bfloat16)
    given = jax.eval_shape(narrow.apply, shapes_of(name), x)
    assert output_type(given) == "bfloat16"


def output_type(shapes):
    first = shapes if isinstance(shapes, jax.ShapeDtypeStruct) else shapes[0]
    return str(first.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse", "dense_block"])
def test_lists_are_taken_as_arrays(name, no_type_hook):
    layer, variables, mask = MODULES[name], variables_of(name), np.arange(6) < 4
    call = jax.jit(lambda v, x, m: output(layer.apply(v, x, mask=m)))
    expected = call(variables, X, np.broadcast_to(mask, X.shape[:-1]))
    given = X.tolist(), [[bool(m) for m in mask] for _ in X]
    got = jax.jit(lambda v: output(layer.apply(v, given[0], mask=given[1])))(variables)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_complex_numbers_are_refused(no_type_hook):
    for layer in (LAYERS["sparse"], LAYERS["linear"], BLOCKS["dense_block"]):
        with pytest.raises(ValueError, match=r"real numbers\. Got complex64"):
            layer.init(jax.random.key(0), jnp.zeros((2, 6, D), jnp.complex64))


@most_modules
def test_narrow_floats_stay_near_float32(name):
    layer, variables = MODULES[name], variables_of(name)
    low = [X.astype(t) for t in (jnp.float16, jnp.bfloat16)]
    outputs = jax.jit(lambda v: [output(layer.apply(v, x)) for x in low])(variables)
    expected = plain(name)
    for y, bits in zip(outputs, (10, 7), strict=True):
        # Another tile may win where two are level, as integers often are.
        error = np.abs(np.float32(y) - expected).max(axis=-1)
        assert np.mean(error < 32 * 2.0**-bits * np.abs(expected).max()) > 0.6


@most_modules
def test_float64_is_computed_in_float64(name):
    layer, variables = MODULES[name], variables_of(name)
    with jax.enable_x64(True):
        y = jax.jit(lambda v, x: output(layer.apply(v, x)))(variables, np.float64(X))
        assert y.dtype == jnp.float64
        assert_same(np.asarray(y), plain(name))


RANKS = [(D,), (6, D), (2, 1, 6, D), (1, 2, 1, 6, D)]


@most_modules
def test_any_leading_axes_give_the_numbers_of_the_plain_call(name):
    layer, variables, expected = MODULES[name], variables_of(name), plain(name)
    shapes = RANKS[1:] if name in BLOCKS else RANKS
    flat = X.reshape(-1, D)
    given = [flat[: max(np.prod(s) // D, 1)].reshape(s) for s in shapes]
    outputs = jax.jit(lambda v: [output(layer.apply(v, x)) for x in given])(variables)
    for y, x in zip(outputs, given, strict=True):
        assert y.shape == x.shape
        tokens = expected.reshape(-1, D)[: x.size // D]
        assert_same(np.asarray(y).reshape(-1, D), tokens)


@pytest.mark.slow
@most_modules
def test_empty_batch_gives_an_empty_output_finite_losses_and_gradients_of_zero(name):
    layer, variables = MODULES[name], variables_of(name)
    empty = jnp.zeros((0, 6, D))

    def loss(params):
        returned = layer.apply({**variables, "params": params}, empty)
        aux = returned[2]["balance"] if "balance" in str(returned) else 0.0
        return output(returned).sum() + aux, output(returned)

    gradient, y = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert y.shape == (0, 6, D)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


@most_modules
def test_length_of_one_gives_the_first_tokens_numbers(name):
    layer, variables = MODULES[name], variables_of(name)
    y = jax.jit(lambda v, x: output(layer.apply(v, x)))(variables, X[:, :1])
    assert_same(y, plain(name)[:, :1])


# Transformations -------------------------------------------------------------------------------------------------------


@most_modules
def test_vmap_and_nn_vmap_give_the_numbers_of_the_plain_call(name):
    layer, variables = MODULES[name], variables_of(name)
    lifted = nn.vmap(
        type(layer),
        variable_axes={"params": None, "routing": None},
        split_rngs={"params": False},
    )(**fields(layer))

    def both(variables, x):
        by_jax = jax.vmap(lambda x: output(layer.apply(variables, x)))(x)
        return by_jax, output(lifted.apply(variables, x))

    for y in jax.jit(both)(variables, X):
        assert_same(y, plain(name))


def fields(layer):
    names = layer.__dataclass_fields__.keys() - {"name", "parent"}
    return {name: getattr(layer, name) for name in names}


class Wrapped(nn.Module):
    """The layer under `nn.remat` with `train` static, in a scan of one step."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        how, rest = fields(self.layer), [False]
        rematted = nn.remat(type(self.layer), static_argnums=(2,))
        if isinstance(self.layer, TriXLinear):
            rematted, rest = nn.remat(TriXLinear), []

        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return output(rematted(**how, name="layer")(x, *rest)), None

        axes = {"params": 0, "routing": 0, "packed": 0}
        scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=1)
        return scan(name="steps")(x, None)[0]


@most_modules
def test_scan_and_remat_give_the_numbers_of_the_plain_call(name):
    variables = jax.tree.map(lambda leaf: leaf[None], variables_of(name))
    nested = {key: {"steps": {"layer": value}} for key, value in variables.items()}
    y = jax.jit(Wrapped(MODULES[name]).apply)(nested, X)
    assert_same(y, plain(name))


@most_modules
def test_donated_variables_and_a_deep_copy_give_the_numbers_of_the_plain_call(name):
    layer = copy.deepcopy(MODULES[name])
    donated = jax.tree.map(jnp.copy, variables_of(name))
    call = jax.jit(lambda v, x: (v, output(layer.apply(v, x))), donate_argnums=0)
    _, y = call(donated, X)
    assert_same(y, plain(name))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(donated))


class Shared(nn.Module):
    """A layer whose variables are the parent's own, by `nn.share_scope`."""

    layer: nn.Module

    def setup(self):
        nn.share_scope(self, self.layer)

    def __call__(self, x):
        return output(self.layer(x))


@most_modules
def test_shared_scope_eval_shape_and_tabulate_have_the_layers_variables(name):
    layer, variables = MODULES[name], shapes_of(name)
    shapes = jax.eval_shape(Shared(layer).init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    table = layer.tabulate(jax.random.key(0), X, console_kwargs={"width": 200})
    assert f"{total:,}" in table
