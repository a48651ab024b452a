"""Blocks, attention and the language model: formulas, causality, cached decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import (
    HierarchicalTriXBlock,
    HierarchicalTriXFFN,
    SparseLookupBlock,
    SparseLookupFFN,
    SparseTriXBlock,
    SparseTriXFFN,
    TransformerConfig,
    TransformerLM,
)
from trix_jax.nn import CausalSelfAttention, DenseBlock, DenseFFN
from trix_jax.nn.attention import attend, attend_back, row_blocks, visible
from trix_kernels import device
from trix_kernels.gpu_specs import GPUS

# Compiling is what takes the time here; no test in this file asks for equal bits across
# programs.

EPS = np.finfo(np.float32).eps
D, H, L, V = 16, 2, 10, 11
FFNS = ["hierarchical", "sparse", "lookup", "dense"]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, V, (2, L)))


def by_default(*quick, of="ffn"):
    """Every kind, those that are not named with the slow tests."""
    slowly = [pytest.param(n, marks=pytest.mark.slow) for n in FFNS if n not in quick]
    return pytest.mark.parametrize(of, [*quick, *slowly])


def config(ffn="sparse", **kwargs):
    sizes = {"vocab_size": V, "context": L, "d_model": D, "n_heads": H}
    sizes["n_layers"] = 2 if ffn == "hierarchical" else 1
    tiles = {"num_tiles": 4, "tiles_per_cluster": 2, "grid_size": 3}
    return TransformerConfig(ffn=ffn, **{**sizes, **tiles, **kwargs})


def random_variables(model, *args):
    """Of the shapes that `init` gives, small as there; cheaper than to compile it."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if leaf.dtype == jnp.bool:
            return jnp.zeros(leaf.shape, bool)
        if leaf.dtype == jnp.int32:
            return jnp.arange(leaf.size, dtype=jnp.int32).reshape(leaf.shape)
        start = 1 if "scale" in path[-1].key else 0
        return jnp.float32(start + 0.1 * rng.normal(size=leaf.shape))

    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    return jax.tree.map_with_path(fill, shapes)


@functools.cache
def initialized(ffn):
    return random_variables(TransformerLM(config(ffn)), TOKENS)


@functools.cache
def forward(ffn):
    return jax.jit(TransformerLM(config(ffn)).apply)


# Attention and blocks --------------------------------------------------------------------------------------------------


def attention_oracle(params, x):
    qkv = np.einsum("bld,dche->cbhle", x, np.float64(params["qkv"]["kernel"]))
    q, k, v = qkv
    scores = np.einsum("bhle,bhme->bhlm", q, k) / np.sqrt(D // H)
    scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    heads = np.einsum("bhlm,bhme->blhe", weights, v)
    return np.einsum("blhe,hed->bld", heads, np.float64(params["out"]["kernel"]))


@pytest.fixture(scope="module")
def attention():
    rng = np.random.default_rng(1)
    layer = CausalSelfAttention(D, H, cache_length=L)
    params = {
        "qkv": {"kernel": rng.normal(0, D**-0.5, (D, 3, H, D // H))},
        "out": {"kernel": rng.normal(0, D**-0.5, (H, D // H, D))},
    }
    x = rng.normal(size=(2, L, D))
    return layer, {"params": jax.tree.map(jnp.float32, params)}, x


def test_attention_matches_the_oracle(attention):
    layer, variables, x = attention
    y = jax.jit(layer.apply)(variables, jnp.float32(x))
    expected = attention_oracle(variables["params"], x)
    # Two sums of D, one of L, and a softmax whose argument of a few units carries the
    # error of its sum of E.
    np.testing.assert_allclose(y, expected, rtol=0, atol=(4 * D + L) * 4 * EPS)


def test_rows_in_blocks_give_what_they_give_together():
    """Values and all gradients, masks and segments included; 10 rows in blocks of 3, 3
    and 4.
    """
    rng = np.random.default_rng(3)
    q, k, v, dy = jnp.float32(rng.normal(size=(4, 2, L, H, D // H)))
    mask = jnp.asarray([[False] * 2 + [True] * 8, [True] * 9 + [False]])
    seen = visible(L, mask, jnp.asarray([[1] * 6 + [2] * 4, [5] * L]))
    real = mask[:, :, None, None]  # the layer hides the other rows

    def pulled(attend):
        y, pull = jax.vjp(lambda *qkv: attend(*qkv, seen) * real, q, k, v)
        return y, *pull(dy)

    found = jax.jit(lambda: pulled(functools.partial(attend_back, blocks=3)))()
    whole = jax.jit(lambda: pulled(attend))()
    assert found[0].shape == q.shape
    for one, other in zip(found, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=4 * L * EPS)


def test_rows_are_in_blocks_on_cpus_alone_and_in_long_sequences():
    lengths = (1, 127, 128, 256, 511, 512, 2048)
    assert [row_blocks(n, "cpu") for n in lengths] == [1, 1, 2, 2, 2, 4, 4]
    assert {row_blocks(n, kind) for n in lengths for kind in ("gpu", "tpu")} == {1}
    assert row_blocks(*jax.export.symbolic_shape("length"), "cpu") == 1
    layer, x = CausalSelfAttention(D, H), jnp.ones((1, 128, D))
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def softmaxes():
        """As many as blocks."""
        return str(jax.make_jaxpr(lambda v: layer.apply(v, x))(variables)).count(
            " exp "
        )

    with device.assumed(GPUS["h100"]):
        assert softmaxes() == 1
    assert softmaxes() == 2


def test_attention_in_pieces_matches_the_oracle(attention):
    layer, variables, x = attention
    step = jax.jit(
        lambda cache, piece: layer.apply(
            {**variables, **cache}, piece, decode=True, mutable=["cache"]
        )
    )
    first, cache = step({}, jnp.float32(x[:, :6]))
    pieces = [first]
    for t in range(6, L, 2):
        y, cache = step(cache, jnp.float32(x[:, t : t + 2]))
        pieces.append(y)
    expected = attention_oracle(variables["params"], x)
    np.testing.assert_allclose(
        jnp.concatenate(pieces, axis=1), expected, rtol=0, atol=(4 * D + L) * 4 * EPS
    )


def test_attention_refuses_heads_that_do_not_divide_and_decoding_without_room():
    x = jnp.ones((1, 2, D))
    with pytest.raises(ValueError, match="n_heads=3 must divide d_model=16"):
        jax.eval_shape(CausalSelfAttention(D, 3).init, jax.random.key(0), x)
    decode = functools.partial(CausalSelfAttention(D, H).init, decode=True)
    with pytest.raises(ValueError, match="cache_length must be set"):
        jax.eval_shape(decode, jax.random.key(0), x)


TILES = {"num_tiles": 4, "tiles_per_cluster": 2}
BLOCKS = {
    "hierarchical": HierarchicalTriXBlock(D, H, d_hidden=6, tiles_per_token=2, **TILES),
    "sparse": SparseTriXBlock(D, H, num_tiles=2, expansion=3, activation="gelu"),
    "lookup": SparseLookupBlock(D, H, grid_size=3, compress_hidden=5, **TILES),
    "dense": DenseBlock(D, H, width=24),
}
FFN_OF = {
    "hierarchical": HierarchicalTriXFFN,
    "sparse": SparseTriXFFN,
    "lookup": SparseLookupFFN,
    "dense": DenseFFN,
}


def layer_norm(x, scale):
    x = np.float64(x)
    centred = x - x.mean(axis=-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    return centred / spread * np.float64(scale)


@by_default("dense", of="name")
def test_block_adds_attention_and_ffn_of_the_normed_stream(name):
    block = BLOCKS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, L, D)), jnp.float32)
    variables = random_variables(block, x)
    params = variables["params"]
    h = layer_norm(x, params["attention_norm"]["scale"])
    middle = np.float64(x) + attention_oracle(params["attention"], h)
    h = jnp.float32(layer_norm(middle, params["ffn_norm"]["scale"]))
    fields = {f: getattr(block, f) for f in FIELDS[name]}
    ffn = FFN_OF[name](**fields)
    own = {key: value["ffn"] for key, value in variables.items()}
    (y, info, aux), (inside, expected_info, _) = jax.jit(
        lambda x, h: (block.apply(variables, x), ffn.apply(own, h))
    )(x, h)
    assert y.shape == x.shape
    assert set(aux) >= {"total_aux"}
    assert (info is None) == (name == "dense")
    if info is not None:
        np.testing.assert_array_equal(info.tiles, expected_info.tiles)
    expected = middle + np.float64(inside)
    np.testing.assert_allclose(
        y, expected, rtol=0, atol=16 * D * EPS * np.abs(expected).max()
    )


FIELDS = {
    "hierarchical": ["d_model", "d_hidden", "tiles_per_token", *TILES],
    "sparse": ["d_model", "num_tiles", "expansion", "activation"],
    "lookup": ["d_model", "grid_size", "compress_hidden", *TILES],
    "dense": ["d_model", "width"],
}


# Language model --------------------------------------------------------------------------------------------------------


@by_default("hierarchical")
def test_logits_have_their_shape_and_every_layer_reports(ffn):
    logits, infos, aux = forward(ffn)(initialized(ffn), TOKENS)
    assert logits.shape == (2, L, V)
    assert logits.dtype == jnp.float32
    assert len(infos) == (2 if ffn == "hierarchical" else 1)
    assert all((info is None) == (ffn == "dense") for info in infos)
    assert aux["total_aux"].shape == ()


@by_default()
def test_logits_have_no_gradient_from_later_positions(ffn):
    model, variables = TransformerLM(config(ffn)), initialized(ffn)
    time = 5
    weight = jnp.asarray(np.random.default_rng(3).normal(size=V), jnp.float32)

    @jax.jit
    @jax.grad
    def gradient(positions):
        params = {**variables["params"], "positions": {"embedding": positions}}
        logits, _, _ = model.apply({**variables, "params": params}, TOKENS)
        return jnp.sum(logits[:, time] * weight[None])

    size = np.abs(gradient(variables["params"]["positions"]["embedding"])).max(axis=1)
    np.testing.assert_array_equal(size[time + 1 :], 0)
    assert (size[: time + 1] > 0).all()


@by_default("hierarchical")
def test_changing_a_token_leaves_earlier_logits(ffn):
    variables, run = initialized(ffn), forward(ffn)
    before = run(variables, TOKENS)[0]
    after = run(variables, TOKENS.at[:, 6].set((TOKENS[:, 6] + 1) % V))[0]
    bound = 8 * D * EPS * np.abs(before).max()
    np.testing.assert_allclose(after[:, :6], before[:, :6], rtol=0, atol=bound)
    assert (np.abs(after - before)[:, 6:].max(axis=-1) > bound).all()


@by_default("hierarchical")
def test_cached_decoding_gives_the_logits_of_one_call(ffn):
    model, variables = TransformerLM(config(ffn)), initialized(ffn)
    step = jax.jit(
        lambda cache, tokens: model.apply(
            {**variables, **cache}, tokens, decode=True, mutable=["cache"]
        )
    )
    (logits, _, _), cache = step({}, TOKENS[:, :7])
    pieces = [logits]
    for t in range(7, L):
        (logits, _, _), cache = step(cache, TOKENS[:, t : t + 1])
        pieces.append(logits)
    whole = forward(ffn)(variables, TOKENS)[0]
    # The longest chain of roundings in a layer is about 6 D, in two layers and a head;
    # half of that is never seen.
    bound = 8 * D * EPS * np.abs(whole).max()
    np.testing.assert_allclose(
        jnp.concatenate(pieces, axis=1), whole, rtol=0, atol=bound
    )
    # Past the context there is nothing to say, and no number pretends that there is.
    (logits, _, _), _ = step(cache, TOKENS[:, :1])
    assert np.isnan(logits).all()


def test_sequence_longer_than_the_context_is_refused():
    model = TransformerLM(config())
    long = jnp.zeros((1, L + 1), jnp.int32)
    with pytest.raises(ValueError, match=f"at most context={L} long. Got {L + 1}"):
        jax.eval_shape(model.apply, initialized("sparse"), long)


def test_tokens_without_a_batch_are_refused(no_type_hook):
    model = TransformerLM(config())
    with pytest.raises(
        ValueError, match=r"tokens must be \[batch, length\]. Got \[4\]"
    ):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(4, jnp.int32))


def test_model_without_a_vocabulary_is_refused():
    model = TransformerLM(config(vocab_size=None))
    with pytest.raises(ValueError, match="vocab_size must be set"):
        jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def count(**kwargs):
    model = TransformerLM(config(**kwargs))
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.slow
def test_parameter_counts_of_tied_and_untied_models():
    norms, attention = 2 * D, 4 * D * D
    outside = V * D + L * D + D
    for ffn, inside in {
        "dense": 2 * D * 4 * D,
        "sparse": 2 * D * 4 * D,
        "hierarchical": 2 * D * 4 * D + D + 1,
        # Directions, splines and their scales, norm, compressor, output scale.
        "lookup": 4 * D + 4 * 27 + 4 + 2 * D + (D * 4 + 4) + (4 * 2 + 2) + 1,
    }.items():
        tied = outside + 2 * (norms + attention + inside)
        assert count(ffn=ffn, n_layers=2) == tied
        assert count(ffn=ffn, n_layers=2, tied=False) == tied + V * D
        assert count(ffn=ffn, n_layers=2, dtype="bfloat16") == tied


@by_default("sparse", "lookup", "dense")
def test_bfloat16_compute_keeps_float32_gradients_and_logits(ffn):
    model, variables = TransformerLM(config(ffn, dtype="bfloat16")), initialized(ffn)

    def loss(params):
        logits, _, aux = model.apply({**variables, "params": params}, TOKENS)
        return jnp.square(logits).mean() + aux["total_aux"], logits

    gradient, logits = jax.eval_shape(jax.grad(loss, has_aux=True), variables["params"])
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_bfloat16_compute_stays_near_float32():
    model, variables = TransformerLM(config(dtype="bfloat16")), initialized("sparse")
    logits, infos, _ = jax.jit(model.apply)(variables, TOKENS)
    whole, whole_infos, _ = forward("sparse")(variables, TOKENS)
    # A token whose tile differs differs in earnest, and is seen by those after it
    # through no further layer.
    same = (infos[0].tiles == whole_infos[0].tiles).all(axis=-1)
    assert same.mean() > 0.8
    error = np.abs(logits - whole)[same]
    assert 0 < error.max() < 16 * 2**-8 * np.abs(whole).max()


@pytest.mark.slow
def test_language_model_starts_near_the_uniform_guess():
    model = TransformerLM(config())
    variables = jax.jit(model.init)(jax.random.key(0), TOKENS)
    logits, _, _ = forward("sparse")(variables, TOKENS)
    off = jax.nn.log_softmax(logits) + np.log(V)
    assert 0 < np.abs(off).max() < 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ffn": "moe"}, "ffn must be one of .* Got 'moe'"),
        ({"dtype": "float16"}, "dtype must be one of .* Got 'float16'"),
        ({"router_input": "id"}, "router_input must be one of .* Got 'id'"),
        ({"n_heads": 3}, "n_heads=3 must divide d_model=16"),
        ({"n_layers": 0}, "n_layers must be at least 1. Got 0"),
        ({"dropout": 1.0}, "dropout must be .* below 1. Got 1.0"),
        ({"num_tiles": 7}, r"num_tiles=7 must divide expansion \* d_model=64"),
        ({"tiles_per_token": 5}, "tiles_per_token=5 .* num_tiles=4"),
        ({"activation": "tanh"}, "activation must be one of .* Got 'tanh'"),
        ({"ffn": "lookup", "tiles_per_token": 3}, "tiles_per_token=3 .*=2"),
        ({"ffn": "lookup", "reads": "each"}, "reads must be one of .* Got 'each'"),
        ({"ffn": "hierarchical", "tiles_per_token": 3}, "tiles_per_token=3 .*=2"),
    ],
)
def test_config_with_a_bad_value_names_argument_rule_and_value(
    wrong, message, no_type_hook
):
    with pytest.raises(ValueError, match=message):
        config(**wrong)
