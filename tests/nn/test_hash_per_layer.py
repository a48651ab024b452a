"""A hash of its own for every layer of the language model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import RoutingConfig, TransformerConfig, TransformerLM, freeze
from trix_jax.hashing import NONE_BEFORE, hash_tiles, pair_ids

V, TILES, K = 11, 8, 2
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, 6)), jnp.int32)
PLAIN = TransformerConfig(
    vocab_size=V,
    context=6,
    d_model=16,
    n_layers=2,
    n_heads=2,
    ffn="sparse",
    num_tiles=TILES,
    tiles_per_token=K,
    routing=RoutingConfig(source="hash"),
)


def tiles_of(model, variables, tokens=TOKENS):
    infos = jax.jit(model.apply)(variables, tokens)[1]
    return [np.asarray(info.tiles).reshape(-1, K) for info in infos]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["embedding", "pair", "hidden"])
def test_every_layer_hashes_ids_of_its_own(kind):
    def model_of(**more):
        config = {**vars(PLAIN), "router_input": kind, **more}
        return TransformerLM(TransformerConfig(**config))

    same, own = model_of(), model_of(hash_per_layer=True)
    variables = jax.jit(same.init)(jax.random.key(0), TOKENS)
    ids = TOKENS
    if kind == "pair":
        none = jnp.full((2, 1), NONE_BEFORE)
        ids = pair_ids(jnp.concatenate([none, ids[:, :-1]], axis=1), ids)
    first, second = (
        hash_tiles((ids + jnp.asarray(i * V, ids.dtype)).reshape(-1), TILES, K)
        for i in (0, 1)
    )
    assert (first != second).any()
    np.testing.assert_array_equal(tiles_of(same, variables), [first, first])
    np.testing.assert_array_equal(tiles_of(own, variables), [first, second])
    assert 24 * V > 255  # of the 25th layer; ids of bytes do not wrap
    deep, narrow = model_of(n_layers=25, hash_per_layer=True), TOKENS.astype(jnp.uint8)
    shapes = jax.eval_shape(deep.init, jax.random.key(0), TOKENS)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    if kind == "embedding":
        last = hash_tiles(TOKENS.reshape(-1) + 24 * V, TILES, K)
        np.testing.assert_array_equal(tiles_of(deep, zeros, narrow)[-1], last)
    frozen = freeze(own, variables, TOKENS)
    np.testing.assert_array_equal(tiles_of(own, frozen), [first, second])


def test_a_hash_for_every_layer_where_nothing_is_hashed_is_refused():
    with pytest.raises(ValueError, match=r"hash_per_layer must be False.*'weights'"):
        TransformerConfig(hash_per_layer=True)
