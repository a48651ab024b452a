"""Every public layer and block takes what `nn.Dense` takes and goes through what training
code does with a module: each time the numbers are those of the plain call.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from trix_jax import (
    HierarchicalTriXBlock,
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseLookupBlock,
    SparseLookupFFN,
    SparseTriXBlock,
    SparseTriXFFN,
    TernaryConfig,
    TriXLinear,
)
from trix_jax.nn import CausalSelfAttention, DenseBlock, DenseFFN

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

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
    "sparse_block": SparseTriXBlock(D, 2),
    "hierarchical_block": HierarchicalTriXBlock(D, 2, **TILES),
    "lookup_block": SparseLookupBlock(D, 2, grid_size=2, **TILES),
    "dense_block": DenseBlock(D, 2, width=12),
}
MODULES = LAYERS | BLOCKS
every_module = pytest.mark.parametrize("name", MODULES)
# What shares its code with another stands behind it.
QUICK = ["sparse", "dense_block"]
most_modules = pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODULES],
)


def output(returned):
    return returned if isinstance(returned, jax.Array) else returned[0]


@functools.cache
def variables_of(name):
    return jit(MODULES[name].init)(jax.random.key(0), X)


@functools.cache
def plain(name):
    """What the layer computes from `X`."""
    call = jit(lambda v, x: output(MODULES[name].apply(v, x)))
    return np.asarray(call(variables_of(name), X))


def assert_same(y, expected):
    # A token may sit in another row of a product, whose sums are then added otherwise:
    # six sums in a row, of at most 4 D terms.
    assert y.shape == expected.shape
    bound = 24 * D * EPS * np.abs(expected).max()
    np.testing.assert_allclose(y, expected, rtol=0, atol=bound)


# What `nn.Dense` takes -------------------------------------------------------------------------------------------------


@most_modules
def test_numpy_and_integers_give_the_numbers_of_floats(name):
    layer, variables = MODULES[name], variables_of(name)
    given = [np.float32(X), np.int8(INTS), jnp.asarray(INTS)]
    outputs = jit(lambda v: [output(layer.apply(v, x)) for x in given])(variables)
    for y in outputs:
        assert y.dtype == jnp.float32
        assert_same(y, plain(name))


@every_module
def test_numpy_initializes_outside_of_jit(name):
    layer = MODULES[name]
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), np.float32(X)))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
        jnp.shape, variables_of(name)
    )


@pytest.mark.slow
def test_numpy_initializes_and_runs_without_jit():
    layer, x = LAYERS["sparse"], np.float32(X)
    layer.init(jax.random.key(0), x)
    assert_same(output(layer.apply(variables_of("sparse"), x)), plain("sparse"))


@every_module
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "bfloat16", "float16"])
def test_output_has_the_dtype_that_dense_gives_or_that_of_the_input(name, dtype):
    x = jax.ShapeDtypeStruct(X.shape, dtype)
    given = jax.eval_shape(MODULES[name].apply, variables_of(name), x)
    is_float = jnp.issubdtype(dtype, jnp.floating)
    assert output_type(given) == (dtype if is_float else "float32")
    narrow = MODULES[name].clone(dtype=jnp.bfloat16)
    given = jax.eval_shape(narrow.apply, variables_of(name), x)
    assert output_type(given) == "bfloat16"


def output_type(shapes):
    first = shapes if isinstance(shapes, jax.ShapeDtypeStruct) else shapes[0]
    return str(first.dtype)


def test_complex_numbers_are_refused(no_type_hook):
    for layer in (LAYERS["sparse"], LAYERS["linear"], BLOCKS["dense_block"]):
        with pytest.raises(ValueError, match=r"real numbers\. Got complex64"):
            layer.init(jax.random.key(0), jnp.zeros((2, 6, D), jnp.complex64))


@most_modules
def test_narrow_floats_stay_near_float32(name):
    layer, variables = MODULES[name], variables_of(name)
    low = [X.astype(t) for t in (jnp.float16, jnp.bfloat16)]
    outputs = jit(lambda v: [output(layer.apply(v, x)) for x in low])(variables)
    expected = plain(name)
    for y, bits in zip(outputs, (10, 7), strict=True):
        # Another tile may win where two are level, as integers often are.
        error = np.abs(np.float32(y) - expected).max(axis=-1)
        assert np.mean(error < 32 * 2.0**-bits * np.abs(expected).max()) > 0.6


@most_modules
def test_float64_is_computed_in_float64(name):
    layer, variables = MODULES[name], variables_of(name)
    with jax.enable_x64(True):
        y = jit(lambda v, x: output(layer.apply(v, x)))(variables, np.float64(X))
        assert y.dtype == jnp.float64
        assert_same(np.asarray(y), plain(name))


RANKS = [(D,), (6, D), (2, 1, 6, D), (1, 2, 1, 6, D)]


@most_modules
def test_any_leading_axes_give_the_numbers_of_the_plain_call(name):
    layer, variables, expected = MODULES[name], variables_of(name), plain(name)
    shapes = RANKS[1:] if name in BLOCKS else RANKS
    flat = X.reshape(-1, D)
    given = [flat[: max(np.prod(s) // D, 1)].reshape(s) for s in shapes]
    outputs = jit(lambda v: [output(layer.apply(v, x)) for x in given])(variables)
    for y, x in zip(outputs, given, strict=True):
        assert y.shape == x.shape
        tokens = expected.reshape(-1, D)[: x.size // D]
        assert_same(np.asarray(y).reshape(-1, D), tokens)


@most_modules
def test_empty_batch_gives_an_empty_output_finite_losses_and_gradients_of_zero(name):
    layer, variables = MODULES[name], variables_of(name)
    empty = jnp.zeros((0, 6, D))

    def loss(params):
        returned = layer.apply({**variables, "params": params}, empty)
        aux = returned[2]["balance"] if "balance" in str(returned) else 0.0
        return output(returned).sum() + aux, output(returned)

    gradient, y = jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert y.shape == (0, 6, D)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, 0)


@most_modules
def test_length_of_one_gives_the_first_tokens_numbers(name):
    layer, variables = MODULES[name], variables_of(name)
    y = jit(lambda v, x: output(layer.apply(v, x)))(variables, X[:, :1])
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

    for y in jit(both)(variables, X):
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
    y = jit(Wrapped(MODULES[name]).apply)(nested, X)
    assert_same(y, plain(name))


@most_modules
def test_donated_variables_and_a_deep_copy_give_the_numbers_of_the_plain_call(name):
    layer = copy.deepcopy(MODULES[name])
    donated = jax.tree.map(jnp.copy, variables_of(name))
    call = jit(lambda v, x: (v, output(layer.apply(v, x))), donate_argnums=0)
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


@every_module
def test_shared_scope_eval_shape_and_tabulate_have_the_layers_variables(name):
    layer, variables = MODULES[name], variables_of(name)
    shapes = jax.eval_shape(Shared(layer).init, jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    table = layer.tabulate(jax.random.key(0), X, console_kwargs={"width": 200})
    assert f"{total:,}" in table


# Forward mode ----------------------------------------------------------------------------------------------------------

CHANCE = np.random.default_rng(4)
TOKENS = jnp.asarray(CHANCE.normal(size=X.shape), jnp.float32)


def of_params_and_input(layer, variables, **given):
    """The output and the loss of a layer as a function of what has derivatives."""
    state = {name: tree for name, tree in variables.items() if name != "params"}

    def call(params, x):
        returned = layer.apply({**state, "params": params}, x, **given)
        if isinstance(returned, jax.Array):
            return returned
        return returned[0], returned[2]["total_aux"]

    return call, (variables["params"], jnp.asarray(TOKENS[..., : X.shape[-1]]))


def drawn_like(tree, seed):
    chance = np.random.default_rng(seed)

    def draw(leaf):
        return jnp.asarray(chance.normal(size=leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(np.vdot(np.float64(x), np.float64(y)) for x, y in pairs)


def assert_tangents_are_those_of_reverse_mode(call, at, eps=EPS):
    """`<dy, J u> = <J^T dy, u>`, by `linearize` and by `jvp` under remat and `vmap`."""
    u, dy = drawn_like(at, 1), drawn_like(jax.eval_shape(call, *at), 2)

    @jit
    def run(at, u, dy):
        def tangent(u):
            return jax.jvp(jax.checkpoint(call), at, u)[1]

        twice = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), u)
        pulled = jax.vjp(call, *at)[1](dy)
        return jax.linearize(call, *at)[1](*u), jax.vmap(tangent)(twice), pulled

    by_linearize, by_vmap, pulled = run(at, u, dy)
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], by_vmap) for i in (0, 1))
    expected = dot(pulled, u)
    bound = 64 * D * eps * dot(*[jax.tree.map(np.abs, t) for t in (dy, first)])
    assert bound > 0
    for found, times in ((by_linearize, 1), (first, 1), (second, 2)):
        assert abs(dot(dy, found) - times * expected) < times * bound


@most_modules
def test_jvp_agrees_with_the_vector_products_of_reverse_mode(name):
    call, at = of_params_and_input(MODULES[name], variables_of(name))
    assert_tangents_are_those_of_reverse_mode(call, at)


WIDE, NARROW = {"d_model": 256, "num_tiles": 2, "expansion": 1}, jnp.bfloat16
TERNARY = {
    "real": {"mode": "none"},
    "soft": {"mode": "soft"},
    "progressive": {"mode": "progressive"},
    "late": {"full_precision_fraction": 0.7},
    "threshold": {"rule": "threshold", "granularity": "channel"},
    "fixed": {"rule": "fixed"},
    "int8": {"activations": "int8"},
}
ROUTING = {
    "sign": {"signature": "sign", "gate": "none"},
    "softmax": {"gate": "softmax"},
    "renormalized": {"gate": "renormalized"},
    "random": {"source": "random"},
    "learned": {"source": "learned"},
}
VARIANTS = {
    **{
        name: SparseTriXFFN(D, tiles_per_token=2, ternary=TernaryConfig(**how))
        for name, how in TERNARY.items()
    },
    **{
        name: HierarchicalTriXFFN(
            D, tiles_per_token=2, routing=RoutingConfig(**how), **TILES
        )
        for name, how in ROUTING.items()
    },
    "groups": SparseTriXFFN(ternary=TernaryConfig(granularity="group"), **WIDE),
    "bfloat16": SparseTriXFFN(D, tiles_per_token=2, dtype=NARROW),
    "masked": SparseTriXFFN(D, tiles_per_token=2),
    "linear channel int8": TriXLinear(
        D, ternary=TernaryConfig(granularity="channel", activations="int8")
    ),
    "linear bfloat16": TriXLinear(D, dtype=NARROW),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_jvp_agrees_with_reverse_mode_in_every_mode(name):
    layer, given = VARIANTS[name], {"progress": 0.5}
    x = TOKENS
    if name == "groups":
        x = jnp.tile(TOKENS[:1, :3], (1, 1, 256 // D))
    if name == "masked":
        given["mask"] = jnp.arange(6)[None] < jnp.asarray([[4], [6]])
        x = jnp.where(given["mask"][..., None], x, jnp.nan)
    variables = jit(layer.init)(jax.random.key(0), x)
    call, (params, _) = of_params_and_input(layer, variables, **given)
    # The learned scale of the rule "fixed" is rounded to bfloat16, and so is its tangent.
    is_rounded = "bfloat16" in name or name == "fixed"
    eps = float(jnp.finfo(NARROW).eps) / (64 * D) if is_rounded else EPS
    assert_tangents_are_those_of_reverse_mode(call, (params, x), eps)


@pytest.mark.slow
@every_module
def test_jacfwd_is_jacrev(name):
    call, (params, x) = of_params_and_input(MODULES[name], variables_of(name))

    def one_token(x):
        return output(call(params, x))

    both = jit(lambda x: (jax.jacfwd(one_token)(x), jax.jacrev(one_token)(x)))
    forward, reverse = both(x[0, :1])
    assert_same(forward, reverse)


@pytest.mark.parametrize(
    "name",
    [n if n == "sparse" else pytest.param(n, marks=pytest.mark.slow) for n in MODULES],
)
def test_hessian_vector_product_is_the_difference_of_gradients(name):
    """Forward over reverse, against central differences in the input. Scores and norms
    are float32 in float64 too, to which the step fits.
    """
    with jax.enable_x64(True):
        call, (params, x) = of_params_and_input(MODULES[name], variables_of(name))
        x, u = np.float64(x), np.random.default_rng(1).normal(size=x.shape)

        def loss(x):
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(call(params, x)))

        gradient, step = jax.grad(loss), 2.0**-13

        @jit
        def run(x, u):
            ends = [gradient(x + sign * step * u) for sign in (1, -1)]
            return jax.jvp(gradient, (x,), (u,))[1], (ends[0] - ends[1]) / (2 * step)

        product, expected = run(x, u)
    bound = 2e-3 * np.abs(expected).max()
    assert bound > 0
    np.testing.assert_allclose(product, expected, rtol=0, atol=bound)
