"""Maps with a transpose of their own, in every mode of differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trix_kernels import block_ffn, block_matmul, device
from trix_kernels.derivatives import linear_map, with_backward
from trix_kernels.weights import pack

ORDER = jnp.asarray([2, 0, 1, 3])
INVERSE = jnp.asarray([1, 2, 0, 3])
X = jnp.asarray([1.0, -2.0, 3.0, 5.0])
U = jnp.asarray([2.0, 1.0, -1.0, 4.0])


def permute(scale_and_ends, x):
    scale, (there, _) = scale_and_ends
    return scale * x[there]


def permute_back(scale_and_ends, dy):
    scale, (_, back) = scale_and_ends
    return (scale * dy)[back]


def scaled_permutation(scale, x, order=ORDER, inverse=INVERSE):
    return linear_map(permute, permute_back, (scale, (order, inverse)), x)


def plain_permutation(scale, x):
    return scale * x[ORDER]


def squares(f):
    return lambda scale, x: jnp.sum(f(scale, x) ** 2)


TRANSFORMED = {
    "jvp": lambda f: jax.jvp(f, (U, X), (X, U)),
    "linearize": lambda f: jax.linearize(f, U, X)[1](X, U),
    "vjp": lambda f: jax.vjp(f, U, X)[1](U),
    "remat": lambda f: jax.vjp(jax.checkpoint(f), U, X)[1](U),
    "vmap of both": lambda f: jax.vmap(f)(jnp.stack([U, X]), jnp.stack([X, U])),
    "vmap of one": lambda f: jax.vmap(f, (None, 0))(U, jnp.stack([X, U])),
    "vmap of the other": lambda f: jax.vmap(f, (0, None))(jnp.stack([X, U]), U),
    "jacfwd": lambda f: jax.jacfwd(f, (0, 1))(U, X),
    "jacrev": lambda f: jax.jacrev(f, (0, 1))(U, X),
    "hessian": lambda f: jax.hessian(squares(f), (0, 1))(U, X),
    "grad of jvp": lambda f: jax.grad(
        lambda x: jnp.sum(jax.jvp(f, (U, x), (X, U))[1] ** 2)
    )(X),
    "grad of grad": lambda f: jax.grad(
        lambda x: jnp.sum(jax.grad(squares(f), 1)(U, x) ** 2)
    )(X),
}
QUICK = ("jvp", "vjp", "vmap of both", "grad of grad")


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TRANSFORMED],
)
def test_linear_map_every_transformation_gives_the_numbers_of_jax(name):
    transform = TRANSFORMED[name]
    found = jax.jit(lambda: transform(scaled_permutation))()
    expected = transform(plain_permutation)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_linear_map_is_transposed_as_it_says():
    pull = jax.jit(lambda dy: jax.vjp(scaled_permutation, U, X)[1](dy)[1])
    assert "scatter" not in pull.lower(U).as_text()
    plain = jax.jit(lambda dy: jax.vjp(plain_permutation, U, X)[1](dy)[1])
    assert "scatter" in plain.lower(U).as_text()


def test_linear_map_vmapped_indices_stay_apart():
    orders = jnp.stack([ORDER, INVERSE]), jnp.stack([INVERSE, ORDER])
    y, pull = jax.vjp(
        lambda x: jax.vmap(scaled_permutation, (None, None, 0, 0))(1.0, x, *orders), X
    )
    np.testing.assert_array_equal(y, [X[ORDER], X[INVERSE]])
    (dx,) = pull(jnp.stack([U, X]))
    np.testing.assert_array_equal(dx, U[INVERSE] + X[ORDER])


def test_linear_map_in_a_shard_map_that_checks_what_varies():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
    def run(x):
        y, dy = jax.jvp(lambda x: scaled_permutation(2.0, x), (x,), (x,))
        return y + dy + jax.grad(lambda x: scaled_permutation(2.0, x).sum())(x)

    both = jnp.concatenate([X, U])
    np.testing.assert_array_equal(
        run(both), jnp.concatenate([4 * X[ORDER], 4 * U[ORDER]]) + 2
    )


def test_with_backward_takes_its_own_gradient_and_the_functions_tangent():
    def root(x, fixed):
        return jnp.sqrt(x) * fixed

    def at_most_one(primals, dy):
        (x, fixed) = primals
        return dy * jnp.minimum(fixed / (2 * jnp.sqrt(x)), 1)

    call = with_backward(root, at_most_one)
    x, fixed = jnp.asarray([0.01, 4.0]), jnp.asarray([1, 3])
    assert jax.grad(lambda x: call(x, fixed).sum())(x).tolist() == [1.0, 0.75]
    _, tangent = jax.jvp(lambda x: call(x, fixed), (x,), (jnp.ones(2),))
    np.testing.assert_allclose(tangent, [5.0, 0.75], rtol=1e-6)


@pytest.mark.slow  # imports Mosaic GPU
def test_gpu_kernels_refuse_derivatives_and_name_the_implementation(monkeypatch):
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")
    up, down = (
        pack(jnp.ones((2, *shape)), jnp.ones((2, 1, 1)), "planar")
        for shape in ((256, 128), (128, 256))
    )
    x, tile = jnp.ones((3, 16, 256), jnp.bfloat16), jnp.zeros(3, jnp.int32)

    def product(x):
        return block_matmul(x, up, tile, 128)

    def ffn(x):
        how = {"implementation": "mosaic_gpu"}
        return block_ffn(x, up, down, tile, (128, 256), jax.nn.relu, **how)

    message = "implementation='mosaic_gpu' has no derivative.*implementation='xla'"
    for kernel in (product, ffn):
        assert jax.eval_shape(kernel, x).dtype == jnp.bfloat16
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(lambda x, f=kernel: jax.jvp(f, (x,), (x,)), x)
        with pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(jax.grad(lambda x, f=kernel: f(x).sum().astype(float)), x)
