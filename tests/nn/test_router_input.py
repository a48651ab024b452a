"""What the signatures are matched with: the FFN's own input, or another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import HierarchicalTriXFFN, SparseLookupFFN, SparseTriXFFN, freeze
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

X = jax.random.normal(jax.random.key(0), (2, 12, 16))
OTHER = jax.random.normal(jax.random.key(1), X.shape)
FLAT = SparseTriXFFN(16, num_tiles=4, tiles_per_token=2)
OTHERS = (
    HierarchicalTriXFFN(16, 8, num_tiles=8, tiles_per_cluster=4, tiles_per_token=2),
    SparseLookupFFN(16, num_tiles=8, tiles_per_cluster=4),
)
LAYERS = [FLAT, *(pytest.param(layer, marks=pytest.mark.slow) for layer in OTHERS)]
SMALL = TransformerConfig(
    vocab_size=11,
    context=16,
    d_model=16,
    n_layers=1,
    n_heads=2,
    ffn="sparse",
    num_tiles=8,
    tiles_per_token=2,
    router_input="embedding",
)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS, ids=["flat", "hierarchical", "lookup"])
def test_tiles_depend_on_the_router_input_alone_and_outputs_on_both(layer):
    variables = jax.jit(layer.init)(jax.random.key(2), X)
    call = jax.jit(lambda x, by: layer.apply(variables, x, router_input=by))
    y, info, _ = call(X, OTHER)
    same_route, same_info, _ = call(-2 * X + 1, OTHER)
    np.testing.assert_array_equal(info.tiles, same_info.tiles)
    np.testing.assert_array_equal(info.gates, same_info.gates)
    assert not np.allclose(y, same_route)
    assert (np.asarray(info.tiles) != np.asarray(call(X, X)[1].tiles)).any()


@pytest.mark.slow
def test_router_input_left_out_is_the_input():
    layer = FLAT
    variables = jax.jit(layer.init)(jax.random.key(2), X)
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal,
            layer.apply(variables, X),
            layer.apply(variables, X, router_input=X),
        )
    )


@pytest.mark.parametrize("layer", LAYERS, ids=["flat", "hierarchical", "lookup"])
def test_router_input_of_another_shape_is_refused(layer, no_type_hook):
    variables = jax.jit(layer.init)(jax.random.key(2), X)
    for wrong in (OTHER[:, :-1], OTHER[..., :8], OTHER.reshape(2, 24, 8)):
        with pytest.raises(ValueError, match="router_input must be"):
            layer.apply(variables, X, router_input=wrong)


@pytest.fixture(scope="module")
def lm():
    model = TransformerLM(SMALL)
    tokens = jax.random.randint(jax.random.key(3), (3, 16), 0, 11)
    return model, jax.jit(model.init)(jax.random.key(4), tokens), tokens


def tiles_of(model, variables, tokens):
    infos = jax.jit(model.apply)(variables, tokens)[1]
    return [np.asarray(info.tiles) for info in infos]


@pytest.mark.slow
def test_a_token_has_the_same_tiles_wherever_it_stands(lm):
    model, variables, tokens = lm
    for tiles in tiles_of(model, variables, tokens):
        for token in range(11):
            mine = tiles[np.asarray(tokens) == token]
            assert (mine == mine[:1]).all()
        assert len({tuple(row) for row in tiles.reshape(-1, 2)}) > 3
    hidden = TransformerLM(
        TransformerConfig(**{**vars(SMALL), "router_input": "hidden"})
    )
    mixed = tiles_of(hidden, variables, tokens)[-1][np.asarray(tokens) == 3]
    assert (mixed != mixed[:1]).any()


@pytest.mark.slow
def test_frozen_model_has_the_same_routes_and_logits(lm):
    model, variables, tokens = lm
    frozen = freeze(model, variables, tokens)
    for was, now in zip(
        tiles_of(model, variables, tokens),
        tiles_of(model, frozen, tokens),
        strict=True,
    ):
        np.testing.assert_array_equal(was, now)
    logits = jax.jit(model.apply)
    np.testing.assert_allclose(
        logits(variables, tokens)[0], logits(frozen, tokens)[0], atol=1e-4
    )


@pytest.mark.slow
def test_cached_generation_equals_uncached(lm):
    model, variables, tokens = lm
    apply = jax.jit(lambda v, t: model.apply(v, t, decode=True, mutable=["cache"]))
    whole = model.apply(variables, tokens)[0]
    state = dict(variables)
    for i in range(tokens.shape[1]):
        (logits, *_), cache = apply(state, tokens[:, i : i + 1])
        state = {**variables, **cache}
        np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=1e-4)


@pytest.mark.slow
def test_gradient_reaches_the_embedding_through_the_gates(lm):
    model, variables, tokens = lm

    def gate(params):
        infos = model.apply({**variables, "params": params}, tokens)[1]
        return sum(info.gates.sum() for info in infos)

    grads = jax.jit(jax.grad(gate))(variables["params"])
    assert jnp.abs(grads["embed"]["embedding"]).max() > 0
