"""The language model's routes by token, by pairs of tokens, and from some layer on by
hidden state; rows and hashes in place of both.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from trix_jax import RoutingConfig, TransformerConfig, TransformerLM, freeze, routing
from trix_jax.hashing import hash_tiles, pair_ids
from trix_jax.nn.token_input import TokenInput, nothing_before, tokens_before

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.

V, L = 11, 8
MOVING = RoutingConfig()
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, L)), jnp.int32)


def lm(router_input="pair", n_layers=1, routing=MOVING, **more):
    config = TransformerConfig(
        vocab_size=V,
        context=L,
        d_model=16,
        n_layers=n_layers,
        n_heads=2,
        ffn="sparse",
        num_tiles=8,
        tiles_per_token=2,
        router_input=router_input,
        routing=routing,
        **more,
    )
    return TransformerLM(config)


@functools.cache
def variables_of(model):
    """Of a start with large embeddings, so that routes differ."""
    variables = jax.jit(model.init)(jax.random.key(1), TOKENS)
    table = jax.random.normal(jax.random.key(2), (V, 16))
    params = {**variables["params"], "embed": {"embedding": table}}
    return {**variables, "params": params}


@functools.cache
def applied(model):
    return jax.jit(functools.partial(model.apply))


def tiles_of(model, variables, tokens=TOKENS, **how):
    infos = applied(model)(variables, tokens, **how)[1]
    return [np.asarray(info.tiles) for info in infos]


# The token before -------------------------------------------------------------------------------------------------------


def before_of(tokens, start=None, **how):
    tokens = jnp.asarray(tokens)
    return tokens_before(tokens, start or nothing_before(tokens), **how)


def test_tokens_before_of_whole_sequences_and_across_calls():
    before, last = before_of([[3, 1, 4], [1, 5, 9]])
    np.testing.assert_array_equal(before, [[-1, 3, 1], [-1, 1, 5]])
    np.testing.assert_array_equal(last.token, [4, 9])
    before, _ = before_of([[2, 6], [5, 3]], last)
    np.testing.assert_array_equal(before, [[4, 2], [9, 5]])
    empty, same = before_of(np.zeros((2, 0), int), last)
    assert empty.shape == (2, 0)
    assert same is last


def test_tokens_before_passes_over_padding_left_right_and_inside():
    mask = jnp.asarray([[0, 0, 3, 1], [7, 0, 5, 0]]) > 0
    before, last = before_of([[0, 0, 3, 1], [7, 0, 5, 0]], mask=mask)
    np.testing.assert_array_equal(before[0, 2:], [-1, 3])
    np.testing.assert_array_equal(before[1, [0, 2]], [-1, 7])
    np.testing.assert_array_equal(last.token, [1, 5])
    _, same = before_of([[6, 6], [6, 6]], last, mask=jnp.zeros((2, 2), bool))
    np.testing.assert_array_equal(same.token, last.token)


def test_tokens_before_start_anew_with_every_segment_also_across_calls():
    tokens = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]
    segments = jnp.asarray([[0, 0, 1, 1, 2], [4, 4, 4, 4, 0]])
    mask = jnp.asarray([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]], bool)
    before, last = before_of(tokens, mask=mask, segment_ids=segments)
    np.testing.assert_array_equal(before[0], [-1, 3, -1, 4, -1])
    np.testing.assert_array_equal(before[1, [0, 2, 3, 4]], [-1, 9, 6, -1])
    for segment_ids, expected in ((None, [5, 3]), ([[2], [4]], [5, -1])):
        ids = None if segment_ids is None else jnp.asarray(segment_ids)
        before, _ = before_of([[7], [7]], last, segment_ids=ids)
        np.testing.assert_array_equal(before[:, 0], expected)


# Pairs ------------------------------------------------------------------------------------------------------------------


def routed_by_hand(model, variables, table, tokens, before):
    """Tiles by `rms_unit(row) + w * rms_unit(row before)`, in numpy."""

    def unit(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    table = np.asarray(table, np.float64)
    before = np.asarray(before)
    second = np.where(before[..., None] < 0, 0, unit(table[np.maximum(before, 0)]))
    x = unit(table[np.asarray(tokens)]) + model.config.pair_weight * second
    state = variables["routing"]["block_00"]["ffn"]["tiles"]["router"]
    scores = unit(x) @ np.asarray(state["signature"], np.float64).T
    return np.argsort(-scores, axis=-1, kind="stable")[..., :2]


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_pairs_meet_the_rows_of_the_token_and_of_the_one_before(weight):
    model = lm(pair_weight=weight)
    variables = variables_of(lm())
    table = variables["params"]["embed"]["embedding"]
    before, _ = before_of(TOKENS)
    expected = routed_by_hand(model, variables, table, TOKENS, before)
    np.testing.assert_array_equal(tiles_of(model, variables)[0], expected)
    by_token = routed_by_hand(model, variables, table, TOKENS, 0 * before - 1)
    assert (expected != by_token).any()


class Inputs(nn.Module):
    """A table and what a model makes of it."""

    weight: float | None = 0.5

    @nn.compact
    def __call__(self, tokens, decode=False, mask=None, segment_ids=None):
        embed = nn.Embed(V, 16, embedding_init=nn.initializers.normal(1.0))
        look = TokenInput(RoutingConfig(), self.weight)
        more = {"mask": mask, "segment_ids": segment_ids}
        return look(tokens, embed(tokens), embed, decode=decode, **more)


@pytest.fixture(scope="module")
def inputs():
    return jax.jit(Inputs().init)(jax.random.key(0), TOKENS)


def test_pairs_are_unit_rows_of_the_token_and_by_weight_of_the_one_before(inputs):
    got = jax.jit(Inputs(weight=2.0).apply)(inputs, TOKENS)
    table = np.asarray(inputs["params"]["Embed_0"]["embedding"], np.float64)
    unit = table / np.sqrt(np.mean(table**2, axis=1, keepdims=True))
    first, second = unit[TOKENS], unit[TOKENS]
    expected = first + 2 * np.pad(second[:, :-1], ((0, 0), (1, 0), (0, 0)))
    np.testing.assert_allclose(got.router_input, expected, atol=1e-5)
    np.testing.assert_array_equal(got.token_ids[:, 0], TOKENS[:, 0])


def test_padding_and_other_segments_change_no_pair(inputs):
    apply = jax.jit(Inputs().apply)
    alone = apply(inputs, TOKENS[:1, :4])
    padded = jnp.concatenate([jnp.zeros((1, 3), jnp.int32), TOKENS[:1, :4]], axis=1)
    parts = jnp.asarray([[0] * 3 + [1] * 4])
    for how in ({"mask": parts == 1}, {"segment_ids": parts}):
        got = apply(inputs, padded, **how)
        for name in ("router_input", "token_ids"):
            there = getattr(got, name)[:, 3:]
            np.testing.assert_array_equal(there, getattr(alone, name))
    other = apply(inputs, padded)
    assert (other.router_input[:, 3] != alone.router_input[:, 0]).any()


def test_decoding_in_pieces_gives_the_pairs_of_one_call(inputs):
    whole = jax.jit(Inputs().apply)(inputs, TOKENS)
    step = jax.jit(lambda v, t: Inputs().apply(v, t, decode=True, mutable=["cache"]))
    state, start = dict(inputs), 0
    for length in (3, 1, 1, 3):
        here, cache = step(state, TOKENS[:, start : start + length])
        for name in ("router_input", "token_ids"):
            expected = getattr(whole, name)[:, start : start + length]
            np.testing.assert_array_equal(getattr(here, name), expected)
        state, start = {**inputs, **cache}, start + length


@pytest.mark.slow
@pytest.mark.parametrize("source", ["weights", "hash"])
def test_padding_and_other_segments_change_no_route_by_pair(source):
    model = lm(routing=RoutingConfig(source=source))
    variables = variables_of(model)
    alone = tiles_of(model, variables, TOKENS[:1, :4])[0]
    padded = jnp.concatenate([jnp.zeros((1, 3), jnp.int32), TOKENS[:1, :4]], axis=1)
    mask = jnp.asarray([[0] * 3 + [1] * 4], bool)
    masked = tiles_of(model, variables, padded, mask=mask)[0]
    np.testing.assert_array_equal(masked[:, 3:], alone)
    segments = jnp.asarray([[0] * 3 + [1] * 4])
    packed = tiles_of(model, variables, padded, segment_ids=segments)[0]
    np.testing.assert_array_equal(packed[:, 3:], alone)
    assert (tiles_of(model, variables, padded)[0][:, 3:] != alone).any()


@pytest.mark.slow
@pytest.mark.parametrize("source", ["weights", "hash"])
def test_decoding_in_pieces_takes_the_tiles_of_one_call(source):
    model = lm(routing=RoutingConfig(source=source))
    variables = variables_of(model)
    whole = tiles_of(model, variables)[0]
    step = jax.jit(lambda v, t: model.apply(v, t, decode=True, mutable=["cache"]))
    state, start = dict(variables), 0
    for length in (3, 1, 1, 3):
        piece = TOKENS[:, start : start + length]
        (_, infos, _), cache = step(state, piece)
        here = np.asarray(infos[0].tiles)
        np.testing.assert_array_equal(here, whole[:, start : start + length])
        state, start = {**variables, **cache}, start + length


# Hashes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_hash_control_hashes_the_pair_where_the_router_input_is_one():
    by_hash = RoutingConfig(source="hash")
    variables = variables_of(lm(routing=by_hash))
    before, _ = before_of(TOKENS)
    for kind, ids in (("pair", pair_ids(before, TOKENS)), ("embedding", TOKENS)):
        got = tiles_of(lm(kind, routing=by_hash), variables)[0]
        expected = hash_tiles(ids.reshape(-1), 8, 2)
        np.testing.assert_array_equal(got.reshape(-1, 2), expected)


# Later layers by hidden state ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_layers_from_hidden_from_on_route_by_hidden_state():
    # The first token is another, the others are not: only by hidden state that shows.
    model = lm("embedding", 2, hidden_from=1)
    variables = variables_of(model)
    other = TOKENS.at[:, 0].set((TOKENS[:, 0] + 1) % V)
    here, there = (applied(model)(variables, tokens)[1] for tokens in (TOKENS, other))
    for name in ("tiles", "gates"):
        by_token = (getattr(infos[0], name)[:, 1:] for infos in (here, there))
        np.testing.assert_array_equal(*by_token)
    assert (here[1].gates[:, 1:] != there[1].gates[:, 1:]).all()


# Held scores ------------------------------------------------------------------------------------------------------------


class Held:
    """A model trained by random steps: at 0.5 of the training it holds."""

    def __init__(self, hold, router_input):
        config = RoutingConfig(hold_after=0.5, hold=hold)
        self.model = lm(router_input, routing=config)
        variables = variables_of(self.model)
        rng = np.random.default_rng(0)

        @jax.jit
        def step(params, state, progress):
            def gates(params):
                how = {"progress": progress, "mutable": ["routing"]}
                variables = {"params": params, "routing": state}
                (_, infos, aux), new = self.model.apply(variables, TOKENS, True, **how)
                routed = infos[0].gates.sum() + aux["balance"]
                return routed, (infos[0], routing.update(new["routing"]))

            return jax.grad(gates, has_aux=True)(params)

        params, state = variables["params"], variables["routing"]
        self.seen, self.params, self.states, self.gradients = [], [], [], []
        for progress in (0.25, 0.5, 0.75, 1.0):
            gradient, (info, state) = step(params, state, progress)
            self.seen.append(info)
            self.params.append(params)
            self.states.append(state)
            self.gradients.append(gradient)
            params = jax.tree.map(
                lambda x: x + jnp.float32(rng.normal(0, 0.5, x.shape)), params
            )


held = functools.cache(Held)
slowly = pytest.param("embedding", marks=pytest.mark.slow)
both_inputs = pytest.mark.parametrize("router_input", [slowly, "pair"])


@pytest.mark.slow
@both_inputs
def test_held_scores_come_from_the_rows_of_the_moment_while_the_table_learns(
    router_input,
):
    run = held("scores", router_input)
    rows = [state["router_input"]["rows"] for state in run.states]
    tables = [params["embed"]["embedding"] for params in run.params]
    np.testing.assert_array_equal(rows[0], tables[0])
    for i in (1, 2, 3):
        np.testing.assert_array_equal(rows[i], tables[1])
    assert not np.allclose(tables[3], tables[1])
    state, info = run.states[2], run.seen[3]
    router = state["block_00"]["ffn"]["tiles"]["router"]
    before, _ = before_of(TOKENS)
    x = routing.rms_unit(tables[1][TOKENS])
    if router_input == "pair":
        second = routing.rms_unit(tables[1][jnp.maximum(before, 0)])
        x += 0.5 * jnp.where(before[..., None] < 0, 0, second)
    scores = routing.match(x.reshape(-1, 16), router["signature"])
    tiles = routing.select_tiles(scores + router["bias"][None], 2)
    np.testing.assert_array_equal(info.tiles.reshape(-1, 2), tiles)
    gates = routing.gates(scores, tiles, "sigmoid")
    np.testing.assert_allclose(info.gates.reshape(-1, 2), gates, rtol=1e-5)
    later = run.states[3]["block_00"]["ffn"]["tiles"]["router"]["bias"]
    assert (later != router["bias"]).any()


@pytest.mark.slow
def test_no_gradient_reaches_the_embedding_through_held_scores():
    run = held("scores", "pair")
    sizes = [float(jnp.abs(g["embed"]["embedding"]).max()) for g in run.gradients]
    assert sizes[0] > 1e-4
    assert sizes[1:] == [0, 0, 0]


@pytest.mark.slow
def test_held_routes_by_token_are_the_same_from_then_on():
    run = held("routes", "embedding")
    for info in run.seen[2:]:
        np.testing.assert_array_equal(info.tiles, run.seen[1].tiles)
        np.testing.assert_array_equal(info.gates, run.seen[1].gates)
    moving = held("scores", "embedding")
    assert (moving.seen[3].tiles != moving.seen[1].tiles).any()


@pytest.mark.slow
@both_inputs
def test_evaluation_decoding_and_frozen_models_see_the_held_rows(router_input):
    run = held("routes", router_input)
    variables = {"params": run.params[3], "routing": run.states[3]}
    expected = np.asarray(run.seen[3].tiles)
    np.testing.assert_array_equal(tiles_of(run.model, variables)[0], expected)
    packed = freeze(run.model, variables, TOKENS)
    np.testing.assert_array_equal(tiles_of(run.model, packed)[0], expected)
    step = jax.jit(lambda v, t: run.model.apply(v, t, decode=True, mutable=["cache"]))
    (_, infos, _), _ = step(packed, TOKENS)
    np.testing.assert_array_equal(infos[0].tiles, expected)


@pytest.mark.slow
def test_rows_held_by_hand_are_those_last_seen_in_training():
    run = held("scores", "pair")
    state = routing.hold_signatures(run.states[0])
    assert state["router_input"]["held"]
    variables = {"params": run.params[3], "routing": state}
    first = {"params": run.params[0], "routing": state}
    np.testing.assert_array_equal(
        tiles_of(run.model, variables)[0], tiles_of(run.model, first)[0]
    )
    assert routing.rebuild_clusters(state).keys() == state.keys()


def test_models_that_hold_nothing_have_the_state_that_they_had():
    for kind in ("embedding", "pair", "hidden"):
        shapes = jax.eval_shape(lm(kind).init, jax.random.key(0), TOKENS)
        assert set(shapes["routing"]) == {"block_00"}
        router = shapes["routing"]["block_00"]["ffn"]["tiles"]["router"]
        assert set(router) == {"bias", "margins", "signature", "frozen"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"router_input": "hidden", "hidden_from": 1, "n_layers": 2}, "hidden_from=1"),
        ({"hidden_from": 2, "n_layers": 2}, "hidden_from=2 must be .* n_layers=2"),
        ({"hidden_from": 0, "n_layers": 2}, "hidden_from=0 must be at least 1"),
        ({"pair_weight": 0.0}, "pair_weight must be positive and finite. Got 0.0"),
        (
            {
                "router_input": "hidden",
                "routing": RoutingConfig(hold_after=0.1, hold="scores"),
            },
            "routing.hold='scores' needs a router_input by token",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message, no_type_hook):
    with pytest.raises(ValueError, match=message):
        lm(**wrong)


@pytest.mark.slow
def test_state_of_an_eager_init_can_be_donated():
    routing = RoutingConfig(source="learned", hold_after=0.5, hold="scores")
    variables = lm(routing=routing).init(jax.random.key(0), TOKENS)
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    expected = 2 * np.asarray(variables["params"]["embed"]["embedding"])
    found = double(variables)
    np.testing.assert_array_equal(found["params"]["embed"]["embedding"], expected)
