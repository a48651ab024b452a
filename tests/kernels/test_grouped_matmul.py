"""Grouped products by XLA, their derivatives, and which implementation runs where. The
Hopper kernels are in `test_grouped_hopper.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from trix_jax.dispatch import make_plan
from trix_kernels import device, grouped_matmul, grouped_outer, transposed_matmul
from trix_kernels.grouped_matmul.api import device_reason, runs, unsupported_reason
from trix_kernels.grouped_matmul.products import Groups

I, O = 5, 3  # noqa: E741  letters of trix_jax/typing.py
ROWS = 4  # of a block
LOADS = {  # rows of each of four tiles, 23 together: one shape for all
    "balanced": (6, 6, 6, 5),
    "skewed": (1, 13, 2, 7),
    "empty tiles": (0, 14, 0, 9),
    "one tile takes all": (0, 0, 23, 0),
}
plan_of = jax.jit(make_plan, static_argnums=(1, 2))


@functools.cache
def planned(counts):
    """Blocks of a plan whose tiles get `counts` rows: tile and filled rows of each."""
    tiles = np.random.default_rng(0).permutation(np.repeat(range(len(counts)), counts))
    plan = plan_of(jnp.asarray(tiles[:, None]), len(counts), ROWS)
    filled = (np.asarray(plan.source) < tiles.size).sum(axis=1)
    return np.asarray(plan.block_tile), filled


def integers(rng, filled, width, padding=np.nan):
    """Blocks of small integers; `padding` in the rows that do not count."""
    x = rng.integers(-3, 4, (len(filled), ROWS, width)).astype(np.float32)
    return np.where(counted(filled)[..., None], x, padding)


def counted(filled):
    return np.arange(ROWS)[None] < filled[:, None]


@functools.partial(jax.jit, static_argnames="implementation")
def products(x, dy, w, tile, filled, implementation=None):
    how = {"implementation": implementation}
    return (
        grouped_matmul(x, w, tile, filled, **how),
        transposed_matmul(dy, w, tile, filled, **how),
        grouped_outer(x, dy, tile, w.shape[0], filled, **how),
    )


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("loads", LOADS)
def test_products_on_a_plans_blocks_are_exact_on_integers(loads, dtype, implementation):
    rng = np.random.default_rng(1)
    tile, filled = planned(LOADS[loads])
    x, dy = (integers(rng, filled, width) for width in (I, O))
    w = rng.integers(-1, 2, (4, I, O)).astype(np.float32)
    run = products if implementation == "xla" else products.__wrapped__
    blocks = jnp.asarray(x, dtype), jnp.asarray(dy, dtype), jnp.asarray(w)
    at = jnp.asarray(tile), jnp.asarray(filled)
    found = run(*blocks, *at, implementation=implementation)
    assert [a.dtype for a in found] == [dtype, dtype, jnp.float32]
    y, dx, dw = (np.asarray(a, np.float32) for a in found)
    expected = np.zeros_like(w)
    for m, r in zip(*np.nonzero(counted(filled)), strict=True):
        np.testing.assert_array_equal(y[m, r], x[m, r] @ w[tile[m]])
        np.testing.assert_array_equal(dx[m, r], w[tile[m]] @ dy[m, r])
        expected[tile[m]] += np.outer(x[m, r], dy[m, r])
    np.testing.assert_array_equal(dw, expected)
    assert not dw[np.asarray(LOADS[loads]) == 0].any()


@pytest.mark.parametrize("loads", LOADS)
def test_runs_of_a_plan_are_where_its_tiles_rows_lie(loads):
    counts = LOADS[loads]
    tile, filled = planned(counts)
    groups = Groups(*map(jnp.asarray, (tile, filled, np.arange(len(counts)))))
    first, found = runs(groups)
    assert tuple(found.tolist()) == counts
    for n, count in enumerate(counts):
        blocks = range(int(first[n]), int(first[n]) + -(-count // ROWS))
        assert [tile[m] for m in blocks] == [n] * len(blocks)


def test_without_filled_every_row_counts():
    x, dy = jnp.ones((2, 3, I)), jnp.ones((2, 3, O))
    dw = grouped_outer(x, dy, jnp.asarray([1, 1]), 2, implementation="xla")
    np.testing.assert_array_equal(dw, [np.zeros((I, O)), np.full((I, O), 6.0)])


def made(dtype=jnp.float32):
    """x, dy, w and the blocks of a skewed plan; what pads is zero."""
    rng = np.random.default_rng(2)
    tile, filled = planned(LOADS["skewed"])
    x, dy = (jnp.asarray(integers(rng, filled, n, 0), dtype) for n in (I, O))
    w = jnp.asarray(rng.integers(-2, 3, (4, I, O)), jnp.float32)
    return x, dy, w, jnp.asarray(tile), jnp.asarray(filled)


def einsums(tile):
    """The three products in JAX's own operations."""
    return (
        lambda x, w: jnp.einsum("mri,mio->mro", x, w[tile]),
        lambda dy, w: jnp.einsum("mro,mio->mri", dy, w[tile]),
        lambda x, dy: jnp.einsum("mri,mro,mn->nio", x, dy, jax.nn.one_hot(tile, 4)),
    )


def ours(tile, filled):
    how = {"filled": filled, "implementation": "xla"}
    return (
        lambda x, w: grouped_matmul(x, w, tile, **how),
        lambda dy, w: transposed_matmul(dy, w, tile, **how),
        lambda x, dy: grouped_outer(x, dy, tile, 4, **how),
    )


DERIVED = {
    "jvp": lambda f, a, b: jax.jvp(f, (a, b), (a + 1, b - 1)),
    "jvp to one": lambda f, a, b: jax.jvp(lambda b: f(a, b), (b,), (b - 1,)),
    "vjp": lambda f, a, b: jax.vjp(f, a, b)[1](f(a, b) + 1),
    "remat": lambda f, a, b: jax.vjp(jax.checkpoint(f), a, b)[1](f(a, b) + 1),
    "vmap": lambda f, a, b: jax.vmap(f, (0, None))(jnp.stack([a, a + 1]), b),
    "grad of grad": lambda f, a, b: jax.grad(
        lambda a: sum(
            jnp.sum(leaf**2)
            for leaf in jax.grad(lambda *ab: jnp.sum(f(*ab) ** 2), (0, 1))(a, b)
        )
    )(a),
}


@pytest.mark.parametrize("product", range(3), ids=["forward", "transposed", "outer"])
@pytest.mark.parametrize(
    "name",
    [
        n if n in ("jvp", "vjp") else pytest.param(n, marks=pytest.mark.slow)
        for n in DERIVED
    ],
)
def test_derivatives_are_those_of_jax(name, product):
    x, dy, w, tile, filled = made()
    args = ((x, w), (dy, w), (x, dy))[product]
    # All rows count: derivatives of what pads are then defined too.
    filled = jnp.full_like(filled, ROWS)
    found = jax.jit(functools.partial(DERIVED[name], ours(tile, filled)[product]))
    expected = functools.partial(DERIVED[name], einsums(tile)[product])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        found(*args),
        expected(*args),
    )


def test_gradient_of_float32_weights_keeps_the_float32_sum():
    # 257 ones: bfloat16 has 256 and 258.
    x = jnp.ones((1, 257, 1), jnp.bfloat16)
    dy = jnp.ones_like(x)

    def pull(w):
        zero = jnp.zeros(1, jnp.int32)
        return jax.vjp(lambda w: grouped_matmul(x, w, zero), w)[1](dy)[0]

    wide, narrow = (pull(jnp.ones((1, 1, 1), t)) for t in (jnp.float32, jnp.bfloat16))
    assert (wide.dtype, float(wide[0, 0, 0])) == (jnp.float32, 257)
    assert (narrow.dtype, float(narrow[0, 0, 0])) == (jnp.bfloat16, 256)


def test_rows_that_do_not_count_do_not_reach_a_gradient_of_weights():
    x, dy, w, tile, filled = made()
    counts = counted(np.asarray(filled))[..., None]
    expected = jax.vjp(lambda w: einsums(tile)[0](x, w), w)[1](dy)[0]
    x, dy = jnp.where(counts, x, jnp.nan), jnp.where(counts, dy, jnp.inf)
    dw = jax.vjp(lambda w: ours(tile, filled)[0](x, w), w)[1](dy)[0]
    np.testing.assert_array_equal(dw, expected)


@pytest.mark.parametrize("which", [0, 1], ids=["x", "dy"])
def test_rows_that_do_not_count_have_no_gradient_of_an_outer_product(which):
    tile, filled = jnp.asarray([0, 1]), jnp.asarray([4, 2])
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.normal(size=(2, 4, n)), jnp.float32) for n in (3, 5)]
    rows[1 - which] = rows[1 - which].at[1, 2:].set(jnp.nan)

    def total(given):
        both = [given if i == which else r for i, r in enumerate(rows)]
        return grouped_outer(*both, tile, 2, filled).sum()

    gradient = jax.grad(total)(rows[which])
    np.testing.assert_array_equal(gradient[1, 2:], 0)
    other = rows[1 - which].sum(axis=-1)
    expected = jnp.broadcast_to(other[..., None], gradient.shape)
    np.testing.assert_allclose(gradient[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[1, :2], expected[1, :2], rtol=1e-6)


def test_a_gradient_not_asked_for_costs_no_product():
    x, _, w, tile, filled = made()

    def loss(x, w):
        return jnp.sum(ours(tile, filled)[0](x, w) ** 2)

    for argnums, count in ((0, 1), ((0, 1), 2)):
        text = jax.jit(jax.grad(loss, argnums)).lower(x, w).as_text()
        assert text.count("stablehlo.dot_general") == 1 + count


def test_a_shard_map_that_checks_what_varies_sums_the_gradient_of_shared_weights():
    x, dy, w, tile, filled = made()
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), P()), out_specs=P())
    def gradient(x, w):
        y, pull = jax.vjp(lambda w: ours(tile, filled)[0](x, w), w)
        return pull(jnp.broadcast_to(dy, y.shape) + 0 * y)[0]

    both = jax.jit(gradient)(jnp.concatenate([x, x + 1]), w)
    whole = jax.vjp(lambda w: einsums(tile)[0](2 * x + 1, w), w)[1](dy)[0]
    np.testing.assert_array_equal(both, whole)


def test_one_trace_serves_every_load():
    traces = []

    @jax.jit
    def gradient(x, w, tile, filled):
        traces.append(1)
        return jax.grad(lambda w: ours(tile, filled)[0](x, w).sum())(w)

    for counts in LOADS.values():
        tile, filled = planned(counts)
        x = jnp.ones((*tile.shape, ROWS, I))
        dw = gradient(x, jnp.ones((4, I, O)), jnp.asarray(tile), jnp.asarray(filled))
        assert tuple(np.asarray(dw[:, 0, 0]).tolist()) == counts
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w, t: grouped_matmul(x, w[:, 1:], t), "the inputs of `w` must be 5"),
        (lambda x, w, t: transposed_matmul(x, w, t), "the outputs of `w` must be 5"),
        (lambda x, w, t: grouped_matmul(x, w, t[:1]), "the size of `block_tile` must be"),
        (lambda x, w, t: grouped_matmul(x, w, t, t[:1]), "the size of `filled` must be"),
        (
            lambda x, w, t: grouped_outer(x, x.astype(jnp.bfloat16), t, 2),
            "the dtype of `dy` must be float32",
        ),
        (lambda x, w, t: grouped_outer(x, x[:, 1:], t, 2), "blocks and rows of `dy`"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_type_hook")
def test_what_does_not_belong_together_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 4, I)), jnp.ones((2, I, O)), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize(
    ("shape", "dtype", "widths", "reason"),
    [
        ((2, 128, 256), jnp.bfloat16, (256, 128), None),
        ((2, 128, 256), jnp.float32, (256, 128), "take bfloat16. Got float32"),
        ((2, 64, 256), jnp.bfloat16, (256, 128), "must have 128 rows. Got 64"),
        ((2, 128, 192), jnp.bfloat16, (192, 128), "Got 192 and 128"),
        ((2, 128, 128), jnp.bfloat16, (128, 64), "Got 128 and 64"),
    ],
)
def test_hopper_says_what_it_takes(monkeypatch, shape, dtype, widths, reason):
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_90a")
    found = unsupported_reason(jnp.zeros(shape, dtype), *widths)
    assert found is reason if reason is None else reason in found


def test_blackwell_keeps_xla_and_says_why(monkeypatch):
    monkeypatch.setattr(device, "unsupported_reason", lambda: None)
    monkeypatch.setattr(device, "arch", lambda: "sm_100a")
    assert "for Hopper (sm_90a)" in (device_reason() or "")
    x = jnp.ones((1, 128, 128), jnp.bfloat16)
    args = x, jnp.ones((1, 128, 128)), jnp.zeros(1, jnp.int32)
    np.testing.assert_array_equal(np.asarray(grouped_matmul(*args), float), 128)
    with pytest.raises(NotImplementedError, match="This is sm_100a"):
        grouped_matmul(*args, implementation="mosaic_gpu")


def test_a_cpu_refuses_the_kernel_by_name():
    x = jnp.ones((1, 128, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="need a GPU"):
        grouped_outer(x, x, jnp.zeros(1, jnp.int32), 1, implementation="mosaic_gpu")
