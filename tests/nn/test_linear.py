"""`TriXLinear`: its formula, gates and signatures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from trix_jax import TernaryConfig, TriXLinear

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.

D = 16
EPS = np.finfo(np.float32).eps
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, D)), jnp.float32)
LINEAR = TriXLinear(12, num_tiles=4, use_bias=True)


@functools.cache
def initialized():
    return jax.jit(LINEAR.init)(jax.random.key(0), X)


def unit(x):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def ternary(w):
    """Absmean per tile."""
    scale = np.float64(jnp.bfloat16(np.abs(w).mean()))
    return np.clip(np.round(w / scale), -1, 1), scale


def linear_with_bias():
    variables = jax.tree.map(lambda leaf: leaf, initialized())
    variables["params"]["bias"] = jnp.arange(12, dtype=jnp.float32)
    return variables


def linear_oracle(params, x, gate=None):
    y = []
    for n, w in enumerate(np.float64(params["kernel"]["kernel"])):
        q, scale = ternary(w)
        y.append((x @ q) * scale * (1 if gate is None else gate[..., n, None]))
    return np.concatenate(y, axis=-1) + np.float64(params["bias"])


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_linear_matches_the_oracle_with_and_without_gates(lead):
    variables = linear_with_bias()
    rng = np.random.default_rng(3)
    x, gate = rng.normal(size=(*lead, D)), rng.normal(size=(*lead, 4))
    x32, gate32 = jnp.float32(x), jnp.float32(gate)
    apply = jax.jit(LINEAR.apply)
    # Sums of D terms, a scale, a gate and a bias of up to 11.
    bound = (D + 3) * EPS * np.abs(x).sum(axis=-1, keepdims=True) + 12 * EPS
    for y, expected in [
        (apply(variables, x32), linear_oracle(variables["params"], x)),
        (apply(variables, x32, gate32), linear_oracle(variables["params"], x, gate)),
    ]:
        assert y.shape == (*lead, 12)
        assert (np.abs(y - expected) <= 3 * bound).all()


def test_linear_gate_of_zero_switches_its_tile_off():
    variables = linear_with_bias()
    gate = jnp.ones((2, 12, 4)).at[..., 1].set(0)
    apply = jax.jit(LINEAR.apply)
    y, full = apply(variables, X, gate), apply(variables, X)
    np.testing.assert_array_equal(y[..., 3:6], jnp.broadcast_to(jnp.float32([3, 4, 5]), (2, 12, 3)))  # fmt: skip
    np.testing.assert_array_equal(y[..., :3], full[..., :3])
    np.testing.assert_array_equal(y[..., 6:], full[..., 6:])


def test_linear_gate_of_another_shape_is_refused(no_type_hook):
    with pytest.raises(
        ValueError, match=r"gate must be \[2, 12, 4\].* Got \[2, 12, 3\]"
    ):
        LINEAR.apply(linear_with_bias(), X, jnp.ones((2, 12, 3)))


def test_linear_signatures_are_the_summed_ternary_weights():
    variables = initialized()
    sums = [
        ternary(w)[0].sum(axis=-1)
        for w in np.float64(variables["params"]["kernel"]["kernel"])
    ]
    got = LINEAR.apply(variables, D, method="signatures")
    np.testing.assert_allclose(got, unit(np.stack(sums)), rtol=4 * EPS)
    signs = LINEAR.apply(variables, D, "sign", method="signatures")
    np.testing.assert_array_equal(signs, np.sign(sums))


@pytest.mark.parametrize("rule", ["absmean", "fixed"])
def test_linear_at_initialization_moves_every_parameter(rule):
    layer = TriXLinear(12, use_bias=True, ternary=TernaryConfig(rule=rule))
    variables = jax.jit(layer.init)(jax.random.key(0), X)
    names = {"bias", "kernel/kernel"} | ({"kernel/scale"} if rule == "fixed" else set())
    assert set(variables) == {"params"}
    assert set(flatten_dict(variables["params"], sep="/")) == names
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(layer.apply(v, X) ** 2)))(variables)
    for path, leaf in flatten_dict(gradient["params"], sep="/").items():
        assert np.abs(leaf).max() > 1e-3, path


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_linear_follows_the_dtype_of_its_input_or_its_own(x_dtype):
    x = X.astype(x_dtype)
    out = jax.eval_shape(LINEAR.apply, initialized(), x)
    assert out.dtype == x_dtype
    named = LINEAR.clone(dtype=jnp.bfloat16)
    assert jax.eval_shape(named.apply, initialized(), x).dtype == jnp.bfloat16


def test_linear_does_not_copy_its_input_for_every_tile():
    x = jnp.ones((512, 256))
    layer = TriXLinear(256, num_tiles=64)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    compiled = jax.jit(layer.apply).lower(variables, x).compile()
    weights = 4 * 256 * 256  # bytes; the input takes twice as many
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * weights
