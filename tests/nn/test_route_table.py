"""Routes by token as a table: what it holds, and that serving from it changes nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import (
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseTriXBlock,
    SparseTriXFFN,
    TransformerConfig,
    TransformerLM,
    freeze,
    routing,
    tabulate_routes,
)
from trix_jax.nn import steering
from trix_jax.nn.route_table import dtype_of

V, L, D = 11, 8, 16
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, L)), jnp.int32)
CONFIG = TransformerConfig(
    vocab_size=V,
    context=L,
    d_model=D,
    n_layers=2,
    n_heads=2,
    ffn="sparse",
    num_tiles=32,
    tiles_per_token=2,
    hidden_from=1,
    routing=RoutingConfig(hold_after=0.5, hold="scores"),
)


def random_variables(model, *args):
    """Of the shapes that `init` gives; cheaper than to compile it."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if leaf.dtype == jnp.bool or path[-1].key in ("bias", "margins"):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if leaf.dtype == jnp.int32:
            return jnp.arange(leaf.size, dtype=jnp.int32).reshape(leaf.shape)
        return jnp.float32(
            ("scale" in path[-1].key) + 0.1 * rng.normal(size=leaf.shape)
        )

    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map_with_path(fill, shapes)


@functools.cache
def frozen_layer(name):
    layer = LAYERS[name]
    return freeze(layer, random_variables(layer, X), X)


@functools.cache
def model_and_frozen(config=CONFIG):
    """Held in a first training call, then with another table of embeddings."""
    model = TransformerLM(config)
    variables = random_variables(model, TOKENS)
    params = dict(variables["params"])
    params["embed"] = {"embedding": jax.random.normal(jax.random.key(2), (V, D))}
    state = variables["routing"]
    if config.routing.holds:
        rows = params["embed"]["embedding"]
        state = {**state, "router_input": {**state["router_input"], "rows": rows}}
        state = routing.hold_signatures(state)
        params["embed"] = {"embedding": jax.random.normal(jax.random.key(3), (V, D))}
    variables = {"params": params, "routing": state}
    return model, freeze(model, variables, TOKENS)


@functools.cache
def tabulated(config=CONFIG):
    return tabulate_routes(*model_and_frozen(config))


def router(variables, block=0):
    return variables["packed"][f"block_{block:02d}"]["ffn"]["tiles"]


@pytest.mark.slow
def test_a_table_has_the_tiles_and_gates_that_scoring_gives_each_token():
    model, frozen = model_and_frozen()
    table = router(tabulated())["router"]
    assert table["tiles"].shape == table["gates"].shape == (V, 2)
    assert (table["tiles"].dtype, table["gates"].dtype) == (jnp.uint8, jnp.float32)
    # All tokens in lines of the context, the last one filled up from the start.
    lines = jnp.asarray([[*range(8)], [8, 9, 10, 0, 1, 2, 3, 4]])
    first = jax.jit(lambda v: model.apply(v, lines)[1][0])(frozen)
    for name in ("tiles", "gates"):
        expected = getattr(first, name).reshape(16, 2)[:V]
        np.testing.assert_array_equal(table[name], expected)
    state = frozen["routing"]
    rows = state["router_input"]["rows"]
    signature = state["block_00"]["ffn"]["tiles"]["router"]["signature"]
    scores = routing.match(rows, signature)
    tiles = routing.select_tiles(scores, 2)
    np.testing.assert_array_equal(table["tiles"], tiles)
    by_hand = routing.gates(scores, tiles, "sigmoid")
    np.testing.assert_allclose(table["gates"], by_hand, rtol=1e-6)


def test_a_table_has_integers_that_name_all_tiles():
    names = [dtype_of(n).name for n in (1, 256, 257, 65_536, 65_537)]
    assert names == ["uint8", "uint8", "uint16", "uint16", "uint32"]


@pytest.mark.slow
def test_serving_from_the_table_is_serving_by_scores_without_a_score():
    model, frozen = model_and_frozen()
    assert "signature_sums" in router(frozen)
    assert "signature_sums" not in router(tabulated())
    assert "signature_sums" in router(tabulated(), block=1)
    assert "router" not in router(tabulated(), block=1)
    apply = jax.jit(model.apply)
    (logits, infos, _), (expected, scored, _) = (
        apply(variables, TOKENS) for variables in (tabulated(), frozen)
    )
    for info, other in zip(infos, scored, strict=True):
        for name in ("tiles", "counts", "entropy", "max_load", "dead_tiles"):
            np.testing.assert_array_equal(getattr(info, name), getattr(other, name))
        np.testing.assert_allclose(info.gates, other.gates, rtol=1e-6)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    one, two = (apply(v, TOKENS)[2]["diversity"] for v in (tabulated(), frozen))
    assert 0 < one < two  # the mean over the layers: of the first one nothing


@pytest.mark.slow
def test_no_score_is_computed():
    config = dataclasses.replace(CONFIG, n_layers=1, hidden_from=None)
    model, frozen = model_and_frozen(config)

    def text(variables):
        call = jax.jit(lambda v, tokens: model.apply(v, tokens)[0])
        return call.lower(variables, TOKENS).compile().as_text()

    assert "f32[16,32]" in text(frozen)  # tokens, tiles
    assert "f32[16,32]" not in text(tabulated(config))


@pytest.mark.slow
def test_decoding_looks_the_same_routes_up():
    model, _ = model_and_frozen()
    whole = jax.jit(model.apply)(tabulated(), TOKENS)[0]
    step = jax.jit(lambda v, t: model.apply(v, t, decode=True, mutable=["cache"]))
    state = dict(tabulated())
    for start in range(0, L, 2):
        (logits, *_), cache = step(state, TOKENS[:, start : start + 2])
        np.testing.assert_allclose(logits, whole[:, start : start + 2], atol=1e-4)
        state = {**tabulated(), **cache}


LAYERS = {
    "ffn": SparseTriXFFN(D, num_tiles=8, tiles_per_token=2),
    "plain": SparseTriXFFN(D, num_tiles=8, routing=RoutingConfig(gate="none")),
    "hierarchical": HierarchicalTriXFFN(D, 4, num_tiles=8, tiles_per_cluster=2),
    "block": SparseTriXBlock(D, 2, num_tiles=8, tiles_per_token=2),
}
ROWS = jnp.asarray(np.random.default_rng(1).normal(size=(V, D)), jnp.float32)
X = jnp.asarray(np.random.default_rng(2).normal(size=(2, L, D)), jnp.float32)


@pytest.mark.parametrize(
    "name",
    ["ffn", *(pytest.param(n, marks=pytest.mark.slow) for n in list(LAYERS)[1:])],
)
def test_a_layer_looks_its_tokens_up_by_their_ids(name):
    layer, variables = LAYERS[name], frozen_layer(name)
    table = tabulate_routes(layer, variables, ROWS)
    by_scores = jax.jit(layer.apply)(variables, X, router_input=ROWS[TOKENS])
    by_table = jax.jit(layer.apply)(table, X, token_ids=TOKENS)
    np.testing.assert_array_equal(by_table[1].tiles, by_scores[1].tiles)
    np.testing.assert_allclose(by_table[1].gates, by_scores[1].gates, rtol=1e-6)
    np.testing.assert_allclose(by_table[0], by_scores[0], atol=1e-5)
    flat = jax.tree_util.tree_leaves_with_path(table["packed"])
    names = {path[-1].key for path, _ in flat}
    assert ("gates" in names) == (name != "plain")
    assert all(float(loss) == 0 for loss in by_table[2].values())


@pytest.mark.parametrize(
    "name",
    ["ffn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain", "block"))],
)
def test_an_id_that_is_no_token_takes_the_routes_of_none(name):
    layer = LAYERS[name]
    table = tabulate_routes(layer, frozen_layer(name), ROWS)
    ids = TOKENS.at[1, -2:].set(jnp.asarray([V, -V - 1]))
    found = jax.jit(layer.apply)(table, X, token_ids=ids)[0]
    expected = jax.jit(layer.apply)(table, X, token_ids=TOKENS)[0]
    np.testing.assert_array_equal(found[1, :-2], expected[1, :-2])
    assert np.isnan(found[1, -2:]).all()


def test_a_layer_with_a_table_needs_ids_and_cannot_be_steered():
    layer, variables = LAYERS["ffn"], frozen_layer("ffn")
    table = tabulate_routes(layer, variables, ROWS)
    with pytest.raises(ValueError, match=r"token_ids must be given .* are a table"):
        layer.apply(table, X)
    steered = steering.pin(table, ("tiles", "router"), 3, TOKENS == 1)
    with pytest.raises(ValueError, match="steering must not be given"):
        layer.apply(steered, X, token_ids=TOKENS)
    with pytest.raises(ValueError, match="no table of routes yet"):
        tabulate_routes(layer, table, ROWS)
    with pytest.raises(ValueError, match="must be a TransformerLM, or a layer"):
        tabulate_routes(layer, variables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_input": "pair"}, "need router_input='embedding'.* Got 'pair'"),
        (
            {"routing": RoutingConfig(source="hash"), "hidden_from": None},
            r"Got routing\.source='hash'",
        ),
    ],
)
def test_models_without_routes_of_single_tokens_get_no_table(changes, message):
    model = TransformerLM(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(ValueError, match=message):
        tabulate_routes(model, {"packed": {}, "routing": {}})
    with pytest.raises(ValueError, match="must be frozen"):
        tabulate_routes(model, {"params": {}, "routing": {}})
