"""`ternary_once`: the same numbers as weights that every call makes for itself."""

import functools
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from trix_jax import (
    HierarchicalTriXFFN,
    SparseLookupFFN,
    SparseTriXFFN,
    TernaryConfig,
    TriXLinear,
    freeze,
    ternary_once,
)
from trix_jax.lm.config import TrainConfig
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

D = 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, D)), jnp.float32)
LAYERS = {
    "late": partial(TriXLinear, 8, ternary=TernaryConfig(full_precision_fraction=0.5)),
    "fixed": partial(TriXLinear, 8, ternary=TernaryConfig(rule="fixed")),
    "channel": partial(
        TriXLinear, 8, ternary=TernaryConfig("ste", "threshold", "channel")
    ),
    "int8": partial(TriXLinear, 8, ternary=TernaryConfig(activations="int8")),
    "sparse": partial(SparseTriXFFN, D, 4, 2),
    "sparse-late": partial(
        SparseTriXFFN, D, 4, 2, ternary=TernaryConfig(full_precision_fraction=0.5)
    ),
    "hierarchical": partial(
        HierarchicalTriXFFN, D, num_tiles=4, tiles_per_cluster=2, tiles_per_token=2
    ),
    "lookup": partial(SparseLookupFFN, D, num_tiles=4, tiles_per_cluster=2),
    "own": partial(
        SparseLookupFFN,
        D,
        num_tiles=4,
        tiles_per_cluster=2,
        tiles_per_token=2,
        reads="own",
    ),
}


def close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)


def initialized(model, x):
    return jax.jit(model.init)(jax.random.key(1), x)


@functools.cache
def compiled(name):
    """A layer's variables, its `ternary_once` and its loss with gradients, for every
    progress.
    """
    layer, x = LAYERS[name](), X

    def loss(params, rest, made, progress):
        given = {"params": params, **rest, **made}
        y = layer.apply(given, x, progress=progress)
        if isinstance(y, jax.Array):
            return (y**2).sum()
        y, _, aux = y
        return (y**2).sum() + aux["total_aux"]

    once = jax.jit(lambda v, progress: ternary_once(layer, v, x, progress=progress))
    return initialized(layer, x), once, jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("progress", [0.25, 0.75])
@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("late", "fixed", "channel", "int8")  # a linear layer compiles soon
        else pytest.param(name, marks=pytest.mark.slow)
        for name in LAYERS
    ],
)
def test_outputs_and_gradients_are_those_of_weights_made_in_the_call(name, progress):
    variables, once, both = compiled(name)
    made = once(variables, progress)
    assert made["ternary"]
    rest = {k: v for k, v in variables.items() if k != "params"}
    args = variables["params"], rest
    close(both(*args, made, progress), both(*args, {}, progress))


def test_ternary_weights_take_a_byte_and_real_ones_four():
    sizes = {}
    for name in ("channel", "late"):
        variables, once, _ = compiled(name)
        made = once(variables, 0.0)
        q = made["ternary"]["kernel"]["q"]
        sizes[name] = q.dtype.itemsize, bool(jnp.isin(q, jnp.array([-1, 0, 1])).all())
    assert sizes == {"channel": (1, True), "late": (4, False)}


@pytest.mark.parametrize("mode", ["none", "soft", "progressive"])
def test_other_modes_have_nothing_to_make(mode):
    layer, x = SparseTriXFFN(D, 4, 2, ternary=TernaryConfig(mode)), jnp.ones((2, D))
    assert ternary_once(layer, initialized(layer, x), x) == {}


def test_a_model_without_ternary_weights_has_nothing_to_make():
    model, x = nn.Dense(3), jnp.ones((2, D))
    assert ternary_once(model, initialized(model, x), x) == {}


def test_it_is_what_the_forward_pass_uses():
    layer, x = TriXLinear(8), X[0]
    variables = initialized(layer, x)
    made = ternary_once(layer, variables, x)
    other = jax.tree.map(lambda w: 10 * w[..., ::-1, :], variables["params"])
    y = layer.apply(variables, x)
    assert jnp.array_equal(layer.apply({"params": other, **made}, x), y)
    assert not jnp.array_equal(layer.apply({"params": other}, x), y)


def test_weights_that_are_real_for_a_while_ask_how_far_training_is():
    variables, _, _ = compiled("late")
    with pytest.raises(ValueError, match="progress must be given in training"):
        ternary_once(LAYERS["late"](), variables, X)
    assert ternary_once(LAYERS["late"](), variables, X, progress=1.0)["ternary"]


@pytest.mark.parametrize("name", ["channel", "fixed"])
def test_a_nan_weight_is_not_lost_in_int8(name):
    variables, _, _ = compiled(name)
    kernel = variables["params"]["kernel"]
    nan = {**kernel, "kernel": kernel["kernel"].at[1, 2, 0].set(jnp.nan)}
    variables = {**variables, "params": {"kernel": nan}}
    layer = LAYERS[name]()
    made = jax.jit(lambda v: ternary_once(layer, v, X))(variables)
    y = layer.apply({**variables, **made}, X)
    assert np.isnan(y[..., 2]).all()  # an output of the second tile
    assert np.isfinite(y[..., :2]).all()


def test_frozen_weights_are_made_already():
    layer, x = TriXLinear(8), X[0]
    variables = initialized(layer, x)
    made = ternary_once(layer, variables, x)
    frozen = freeze(layer, {**variables, **made}, x)
    assert sorted(frozen) == ["packed", "params"]
    with pytest.raises(ValueError, match="made already"):
        ternary_once(layer, frozen, x)
    with pytest.raises(ValueError, match="must hold 'params'"):
        ternary_once(layer, variables["params"], x)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, progress=1.0):
        layers = nn.scan(
            nn.remat(_Layer),
            variable_axes={"params": 0, "routing": 0, "ternary": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(name="layers")(x, None)[0]


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return SparseTriXFFN(D, 4, 2, residual=True, name="ffn")(x)[0], None


@pytest.mark.slow
def test_layers_under_scan_and_remat_take_theirs():
    model, x = Scanned(), X[0]
    variables = initialized(model, x)
    made = jax.jit(lambda v: ternary_once(model, v, x))(variables)
    assert made["ternary"]["layers"]["ffn"]["tiles"]["up"]["q"].shape == (3, 4, D, 8)

    @jax.jit
    @jax.value_and_grad
    def loss(params, made):
        return (model.apply({**variables, "params": params, **made}, x) ** 2).sum()

    close(loss(variables["params"], made), loss(variables["params"], {}))
    other = jax.tree.map(np.zeros_like, variables["params"])
    (with_theirs, _), (without, _) = loss(other, made), loss(other, {})
    np.testing.assert_allclose(without, (x**2).sum(), rtol=1e-6)  # the residual alone
    assert abs(with_theirs - without) > 0.1


CONFIG = TransformerConfig(
    vocab_size=32,
    context=8,
    d_model=D,
    n_layers=2,
    n_heads=2,
    ffn="sparse",
    num_tiles=4,
    tiles_per_token=2,
)


def primitives_in_loops(jaxpr, inside=False):
    """The names of all primitives that a scan runs more than once."""
    for equation in jaxpr.eqns:
        if inside:
            yield equation.primitive.name
        loops = inside or equation.primitive.name == "scan"
        for leaf in itertools.chain(*map(_jaxprs, equation.params.values())):
            yield from primitives_in_loops(leaf, loops)


def _jaxprs(value):
    leaves = value if isinstance(value, tuple | list) else [value]
    return [
        getattr(v, "jaxpr", v)
        for v in leaves
        if hasattr(getattr(v, "jaxpr", v), "eqns")
    ]


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_step_rounds_weights_once_however_many_micro_batches_it_has(accumulate):
    train = TrainConfig(steps=10, batch_size=4, accumulate=accumulate)
    model, optimizer = TransformerLM(CONFIG), make_optimizer(train)
    state = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    batch = jax.ShapeDtypeStruct((accumulate, 4 // accumulate, 9), jnp.int32)
    step = make_train_step(model, optimizer, train)
    jaxpr = jax.make_jaxpr(step)(state, batch).jaxpr
    rounds = [n for n in primitives_in_loops(jaxpr) if n == "round"]
    assert (len(rounds) == 0) == (accumulate > 1)
