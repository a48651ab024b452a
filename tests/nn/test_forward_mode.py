"""Forward mode of every public layer and block: tangents are those of reverse mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_layers import (
    EPS,
    LAYERS,
    MODULES,
    TILES,
    D,
    X,
    assert_same,
    every_module,
    most_modules,
    output,
    variables_of,
)

from trix_jax import (
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseTriXFFN,
    TernaryConfig,
    TriXLinear,
)

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

    @jax.jit
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
    "threshold": {"rule": "threshold", "granularity": "channel"},
    "fixed": {"rule": "fixed"},
    "int8": {"activations": "int8"},
}
ROUTING = {
    "softmax": {"gate": "softmax"},
    "renormalized": {"gate": "renormalized"},
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
    variables = jax.jit(layer.init)(jax.random.key(0), x)
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

    both = jax.jit(lambda x: (jax.jacfwd(one_token)(x), jax.jacrev(one_token)(x)))
    forward, reverse = both(x[0, :1])
    assert_same(forward, reverse)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)  # a block adds what Flax has
def test_hessian_vector_product_is_the_difference_of_gradients(name):
    """Forward over reverse, against central differences in the input. Scores and norms
    are float32 in float64 too, to which the step fits.
    """
    variables = variables_of(name)  # shared by all tests: float32
    with jax.enable_x64(True):
        call, (params, x) = of_params_and_input(MODULES[name], variables)
        x, u = np.float64(x), np.random.default_rng(1).normal(size=x.shape)

        def loss(x):
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(call(params, x)))

        gradient, step = jax.grad(loss), 2.0**-13

        @jax.jit
        def run(x, u):
            ends = [gradient(x + sign * step * u) for sign in (1, -1)]
            return jax.jvp(gradient, (x,), (u,))[1], (ends[0] - ends[1]) / (2 * step)

        product, expected = run(x, u)
    bound = 2e-3 * np.abs(expected).max()
    assert bound > 0
    np.testing.assert_allclose(product, expected, rtol=0, atol=bound)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1], ids=["parameters", "input"])
def test_a_gradient_penalty_has_the_gradient_that_forward_mode_gives(which):
    call, at = of_params_and_input(MODULES["sparse"], variables_of("sparse"))
    v = drawn_like(at[which], 3)

    def loss(part):
        y, _ = call(*at[:which], part, *at[which + 1 :])
        return jnp.sum(y**2)

    def along(part):
        pairs = zip(
            jax.tree.leaves(jax.grad(loss)(part)), jax.tree.leaves(v), strict=True
        )
        return sum(jnp.vdot(g, d) for g, d in pairs)

    by_reverse = jax.jit(jax.grad(along))(at[which])
    by_forward = jax.jit(lambda part: jax.jvp(jax.grad(loss), (part,), (v,))[1])(
        at[which]
    )
    for found, expected in zip(
        jax.tree.leaves(by_reverse), jax.tree.leaves(by_forward), strict=True
    ):
        assert np.abs(expected).max() > 0
        assert_same(found, np.asarray(expected))
