"""Tokens to blocks and back: a permutation, whatever the routing, in shapes that do not
depend on it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trix_jax import dispatch
from trix_kernels import hlo

jit_plan = jax.jit(dispatch.make_plan, static_argnums=(1, 2))

# (T, K, N, rows): one tile, one token, more tiles than assignments, A not divisible by
# the rows, K of several.
SHAPES = [
    (1, 1, 1, None),
    (7, 1, 4, 3),
    (24, 1, 4, None),
    (24, 2, 4, 8),
    (5, 3, 16, None),
    (13, 1, 1, 4),
]


@st.composite
def routings(draw):
    tokens, k, num_tiles, rows = draw(st.sampled_from(SHAPES))
    # A narrow range of tiles leaves the others empty.
    low = draw(st.integers(0, num_tiles - 1))
    high = draw(st.integers(low, num_tiles - 1))
    value = st.integers(low, high)
    flat = draw(st.lists(value, min_size=tokens * k, max_size=tokens * k))
    return np.asarray(flat, np.int32).reshape(tokens, k), num_tiles, rows


@given(routings())
@settings(max_examples=40)
def test_plan_of_any_routing_is_a_permutation_into_blocks_of_one_tile(routing):
    tiles, num_tiles, rows = routing
    plan = jax.tree.map(np.asarray, jit_plan(tiles, num_tiles, rows))
    assignments = tiles.size
    rows = rows or dispatch.block_rows(assignments, num_tiles)
    blocks = dispatch.num_blocks(assignments, num_tiles, rows)
    assert plan.source.shape == (blocks, rows)
    assert plan.block_tile.shape == (blocks,)
    placed = plan.source[plan.source < assignments]
    np.testing.assert_array_equal(np.sort(placed), np.arange(assignments))
    assert (plan.source[plan.source >= assignments] == assignments).all()
    flat_source = plan.source.reshape(-1)
    np.testing.assert_array_equal(
        flat_source[plan.slot.reshape(-1)], np.arange(assignments)
    )
    assert ((plan.block_tile >= 0) & (plan.block_tile < num_tiles)).all()
    for tile, sources in zip(plan.block_tile, plan.source, strict=True):
        assert (tiles.reshape(-1)[sources[sources < assignments]] == tile).all()


@pytest.mark.slow
@given(routings())
@settings(max_examples=20)
def test_from_blocks_inverts_to_blocks_exactly(routing):
    tiles, num_tiles, rows = routing
    x = np.random.default_rng(0).normal(size=(len(tiles), 3)).astype(np.float32)
    blocks, back = round_trip(x, tiles, num_tiles, rows)
    expected = np.repeat(x[:, None], tiles.shape[1], axis=1)
    np.testing.assert_array_equal(back, expected)
    # Every row that no assignment owns is zero: nothing leaks into padding.
    assert np.count_nonzero(blocks.any(axis=-1)) == tiles.size


@jax.jit(static_argnums=(2, 3))
def round_trip(x, tiles, num_tiles, rows):
    plan = dispatch.make_plan(tiles, num_tiles, rows)
    blocks = dispatch.to_blocks(x, plan)
    return blocks, dispatch.from_blocks(blocks, plan)


def plan_by_hand(tiles, num_tiles, rows, mask):
    """Assignments one after the other into the open block of their tile."""
    assignments, runs = tiles.size, [[] for _ in range(num_tiles)]
    for number, tile in enumerate(tiles.reshape(-1)):
        if mask[number // tiles.shape[1]]:
            runs[tile].append(number)
    cut = [
        (tile, run[i : i + rows])
        for tile, run in enumerate(runs)
        for i in range(0, len(run), rows)
    ]
    blocks = dispatch.num_blocks(assignments, num_tiles, rows)
    source = np.full((blocks, rows), assignments)
    block_tile, slot = np.full(blocks, num_tiles - 1), np.zeros(assignments, int)
    for block, (tile, run) in enumerate(cut):
        block_tile[block], source[block, : len(run)] = tile, run
        slot[run] = block * rows + np.arange(len(run))
    return block_tile, source, slot.reshape(tiles.shape), [len(cut)]


@pytest.mark.slow
@given(routings(), st.integers(0, 3))
@settings(max_examples=40)
def test_plan_is_the_one_made_by_hand_masked_or_not(routing, hidden):
    tiles, num_tiles, rows = routing
    rows = rows or dispatch.block_rows(tiles.size, num_tiles)
    mask = np.arange(len(tiles)) % 4 >= hidden
    plan = jit_plan(tiles, num_tiles, rows, mask if hidden else None)
    expected = plan_by_hand(tiles, num_tiles, rows, mask)
    for found, wanted in zip(plan, expected, strict=True):
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, wanted)


def test_plan_counts_sorts_and_gathers_without_a_loop():
    tiles, mask = jnp.zeros((64, 2), jnp.int32), jnp.ones(64, bool)
    for given_mask in (None, mask):
        compiled = jit_plan.lower(tiles, 16, 8, given_mask).compile()
        assert hlo.while_loops(compiled.as_text()) == 0


def test_plan_keeps_token_order_within_a_tile():
    tiles = jnp.asarray([[1], [0], [1], [1], [0]])
    plan = jit_plan(tiles, 2, 2)
    np.testing.assert_array_equal(plan.source[:3], [[1, 4], [0, 2], [3, 5]])
    np.testing.assert_array_equal(plan.block_tile[:3], [0, 1, 1])


@pytest.mark.parametrize("assignments", [1, 7, 64, 1000, 8192])
@pytest.mark.parametrize("num_tiles", [1, 4, 64])
def test_blocks_are_enough_for_the_worst_routing_and_cost_little(
    assignments, num_tiles
):
    for rows in {1, 8, 128, dispatch.block_rows(assignments, num_tiles)}:
        blocks = dispatch.num_blocks(assignments, num_tiles, rows)
        assert blocks * rows < assignments + num_tiles * rows
        # The worst routing: as many tiles as can have one assignment more than whole
        # blocks.
        used = min(num_tiles, assignments)
        extra = (assignments - used) // rows
        assert used + extra <= blocks


def test_default_blocks_do_at_most_twice_the_work():
    for assignments, num_tiles in [(8192, 64), (768, 16), (4096, 4), (3072, 16)]:
        rows = dispatch.block_rows(assignments, num_tiles)
        blocks = dispatch.num_blocks(assignments, num_tiles, rows)
        assert blocks * rows <= 2 * assignments


def test_changing_routings_share_one_trace():
    traces = []

    @jax.jit
    def run(x, tiles):
        traces.append(None)
        plan = dispatch.make_plan(tiles, 4)
        return dispatch.from_blocks(dispatch.to_blocks(x, plan), plan)

    x = jnp.ones((16, 2))
    rng = np.random.default_rng(0)
    routes = [np.zeros((16, 2)), np.full((16, 2), 3), rng.integers(0, 4, (16, 2))]
    for tiles in routes:
        run(x, tiles.astype(np.int32)).block_until_ready()
    assert len(traces) == 1


@pytest.mark.parametrize("routing", ["random", "one tile", "last tile empty"])
def test_gradients_equal_those_of_a_gather_per_token(routing):
    tokens, k, num_tiles = 10, 2, 4
    rng = np.random.default_rng(1)
    tiles = {
        "random": rng.integers(0, num_tiles, (tokens, k)),
        "one tile": np.ones((tokens, k)),
        "last tile empty": rng.integers(0, num_tiles - 1, (tokens, k)),
    }[routing]
    tiles = jnp.asarray(tiles, jnp.int32)
    # Small integers make every product and sum exact, so that equality can be asked
    # for.
    x = rng.integers(-3, 4, (tokens, 3)).astype(np.float32)
    w = rng.integers(-3, 4, (num_tiles, 3, 5)).astype(np.float32)
    dy = rng.integers(-3, 4, (tokens, k, 5)).astype(np.float32)

    def blocked(x, w):
        plan = dispatch.make_plan(tiles, num_tiles, 4)
        y = jnp.matmul(dispatch.to_blocks(x, plan), w[plan.block_tile])
        return jnp.sum(dispatch.from_blocks(y, plan) * dy)

    def naive(x, w):
        return jnp.sum(jnp.einsum("td,tkdo->tko", x, w[tiles]) * dy)

    ours = jax.jit(jax.grad(blocked, (0, 1)))(x, w)
    for got, expected in zip(ours, jax.grad(naive, (0, 1))(x, w), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert np.any(expected)


def test_round_trip_under_vmap_keeps_every_batch_apart():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3, 6, 2)).astype(np.float32)
    tiles = rng.integers(0, 4, (3, 6, 1)).astype(np.int32)
    _, back = jax.vmap(lambda x, t: round_trip(x, t, 4, 2))(x, tiles)
    np.testing.assert_array_equal(back[:, :, 0], x)


# Written out, and in a loop.
@pytest.mark.parametrize("k", [3, dispatch.READS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_over_assignments_and_their_gradients_are_those_of_reading_all(k, dtype):
    tokens, num_tiles = 9, 20
    rng = np.random.default_rng(3)
    tiles = np.stack([rng.permutation(num_tiles)[:k] for _ in range(tokens)])
    plan = dispatch.make_plan(jnp.asarray(tiles, jnp.int32), num_tiles, 2)
    # Small integers make every product and sum exact.
    y = rng.integers(-3, 4, (*plan.source.shape, 5))
    gates, dy = rng.integers(-1, 2, (tokens, k)), rng.integers(-2, 3, (tokens, 5))
    y, gates = jnp.asarray(y, dtype), jnp.asarray(gates, jnp.float32)

    def gated(y, gates):
        return dispatch.gated_sum(y, gates, plan)

    def gated_reads(y, gates):
        return (dispatch.from_blocks(y, plan) * gates[..., None]).sum(axis=1)

    def plain(y):
        return dispatch.sum_from_blocks(y, plan)

    def plain_reads(y):
        return dispatch.from_blocks(y, plan).sum(axis=1)

    for ours, reads, args in (
        (gated, gated_reads, (y, gates)),
        (plain, plain_reads, (y,)),
    ):
        found, pull = jax.vjp(ours, *args)
        expected, pull_reads = jax.vjp(reads, *args)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
        assert np.any(expected)
        cotangent = jnp.asarray(dy, found.dtype)
        for a, b in zip(pull(cotangent), pull_reads(cotangent), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype
            assert np.any(b)
