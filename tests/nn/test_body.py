"""The language model's body: documents apart, positions, norms, initialization, and
decoding under a mask.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from trix_jax import TransformerConfig, TransformerLM
from trix_jax.nn import CausalSelfAttention, cudnn
from trix_jax.nn.positions import rotate
from trix_jax.ternary import TernaryConfig, hard_ternary

END, D = 0, 16
SIZES = {"vocab_size": 11, "context": 12, "d_model": D, "n_layers": 2, "n_heads": 2}
BODIES = {
    "dense": {"ffn": "dense", "ffn_width": 8},
    "rotary": {"ffn": "dense", "ffn_width": 8, "positions": "rotary", "norm": "rms"}
    | {"qk_norm": True, "init": "fan_in"},
    "sparse": {"ffn": "sparse", "tiles_per_token": 2, "positions": "rotary"},
}
DOCUMENTS = [[END, 3, 1, 4], [END, 1], [END, 5, 9, 2, 6, 5]]
LINE = np.concatenate(DOCUMENTS)[None]
most_bodies = pytest.mark.parametrize(
    "body",
    [n if n == "rotary" else pytest.param(n, marks=pytest.mark.slow) for n in BODIES],
)


@functools.cache
def model_and_variables(body, document_mask=True):
    how = {"document_mask": document_mask, "end_token": END}
    model = TransformerLM(TransformerConfig(**SIZES, **BODIES[body], **how))
    return model, jax.jit(model.init)(jax.random.key(0), LINE)


def logits(body, tokens, document_mask=True, **how):
    model, variables = model_and_variables(body, document_mask)
    return jax.jit(model.apply)(variables, np.asarray(tokens), **how)[0]


def assert_near(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@most_bodies
def test_a_packed_document_has_the_logits_it_gets_alone(body):
    packed = logits(body, LINE)[0]
    alone = [logits(body, [document])[0] for document in DOCUMENTS]
    assert_near(packed, np.concatenate(alone))
    crossed = logits(body, LINE, document_mask=False)[0]
    assert np.abs(crossed - packed)[4:].max() > 1e-2  # the mask is what does it


def decoded(body, tokens, pieces, mask=None):
    """Logits of a line read piece by piece through the cache."""
    model, variables = model_and_variables(body)
    read = jax.jit(
        functools.partial(model.apply, decode=True, mutable=["cache"]),
    )
    cache, parts, start = {}, [], 0
    for length in pieces:
        now = slice(start, start := start + length)
        part = None if mask is None else mask[:, now]
        out, cache = read({**variables, **cache}, tokens[:, now], mask=part)
        parts.append(out[0])
    return np.concatenate(parts, axis=1)


@pytest.mark.slow
@most_bodies
def test_documents_decoded_piece_by_piece_have_the_logits_of_one_call(body):
    whole = logits(body, LINE)
    assert_near(decoded(body, LINE, [3, 1, 1, 1, 1, 5]), whole)


@pytest.mark.slow
def test_a_cache_from_init_is_empty():
    """As that of `nn.MultiHeadDotProductAttention`."""
    how = {"router_input": "pair", "document_mask": True, "end_token": END}
    model = TransformerLM(
        TransformerConfig(**SIZES | {"n_layers": 1}, **BODIES["sparse"], **how)
    )
    made = jax.jit(functools.partial(model.init, decode=True))(
        jax.random.key(0), LINE[:, :1]
    )
    step = jax.jit(functools.partial(model.apply, decode=True, mutable=["cache"]))
    cache, tokens = {"cache": made.pop("cache")}, LINE[:, :3]
    given, _ = step({**made, **cache}, tokens)
    expected, _ = step(made, tokens)
    np.testing.assert_array_equal(given[0], expected[0])
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(cache)}
    assert names >= {"index", "keys", "position", "segment", "document", "before"}


@pytest.mark.slow
@most_bodies
def test_a_padded_prompt_decodes_as_the_prompts_without_padding(body):
    prompts = [[END, 3, 1, 4, 1], [END, 5, 9]]
    text = np.asarray([[7, 2], [8, 6]])
    padding = np.asarray([[END] * (5 - len(prompt)) + prompt for prompt in prompts])
    mask = np.asarray([[True] * 5, [False] * 2 + [True] * 3])
    tokens = np.concatenate([padding, text], axis=1)
    mask = np.concatenate([mask, np.ones((2, 2), bool)], axis=1)
    together = decoded(body, tokens, [5, 1, 1], mask)
    for i, prompt in enumerate(prompts):
        alone = logits(body, [[*prompt, *text[i]]])[0]
        assert_near(together[i, mask[i]], alone)


@pytest.mark.slow
def test_attention_keeps_a_mask_and_segments_for_later_calls():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, D)), jnp.float32)
    mask = np.asarray([[False, True, True, True, True, True], [True] * 6])
    ids = np.asarray([[9, 4, 4, 7, 7, 7], [2, 2, 2, 2, 2, 2]])
    layer = CausalSelfAttention(D, 2, cache_length=6, rotary=True, qk_norm=True)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    whole = jax.jit(layer.apply)(variables, x, mask=mask, segment_ids=ids)
    read = jax.jit(functools.partial(layer.apply, decode=True, mutable=["cache"]))
    first, cache = read(variables, x[:, :4], mask=mask[:, :4], segment_ids=ids[:, :4])
    later, cache = read({**variables, **cache}, x[:, 4:])
    assert_near(jnp.concatenate([first, later], axis=1), whole)
    with pytest.raises(ValueError, match=r"the cache holds 6 tokens\. Got 1 after 6"):
        layer.apply({**variables, **cache}, x[:, :1], decode=True, mutable=["cache"])


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 3])
def test_a_cache_that_is_full_inside_a_jit_gives_nan(length):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 8, D)), jnp.float32)
    layer = CausalSelfAttention(D, 2, cache_length=6, rotary=True)
    read = jax.jit(functools.partial(layer.apply, decode=True, mutable=["cache"]))
    params = {"params": layer.init(jax.random.key(0), x)["params"]}
    room = 6 - length
    y, cache = read(params, x[:, :room])
    fits, cache = read({**params, **cache}, x[:, room:6])
    assert np.isfinite(y).all()
    assert np.isfinite(fits).all()
    assert np.isnan(read({**params, **cache}, x[:, 6 - length : 6])[0]).all()


@pytest.mark.parametrize("length", [1, 5])
def test_rotation_is_a_complex_phase_and_products_see_distances_alone(length):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 1, length, 1, 6)).astype(np.float32)
    at = np.arange(length)[None]
    z = x[..., :3] + 1j * x[..., 3:]
    phase = at[..., None, None] * 10_000.0 ** (-np.arange(3) / 3)
    turned = z * np.exp(1j * phase)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    assert_near(rotate(jnp.asarray(x), jnp.asarray(at)), expected)

    def products(shift):
        a, b = (rotate(jnp.asarray(v), jnp.asarray(at + shift)) for v in (x, y))
        return np.einsum("bqhe,bkhe->bqk", a, b)

    assert_near(products(7), products(0), 1e-4)


@pytest.mark.slow
def test_queries_and_keys_have_unit_rms_with_qk_norm():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, D)), jnp.float32)
    layer = CausalSelfAttention(D, 2, qk_norm=True)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    q, k, v = np.moveaxis(np.tensordot(x, params["qkv"]["kernel"], 1), -3, 0)
    q, k = (t / np.sqrt(np.mean(t**2, axis=-1, keepdims=True) + 1e-6) for t in (q, k))
    scores = np.einsum("bqhe,bkhe->bhqk", q, k) / np.sqrt(D // 2)
    scores = np.where(np.tril(np.ones((4, 4), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhqk,bkhe->bqhe", weights, v)
    expected = np.tensordot(y, params["out"]["kernel"], 2)
    assert_near(layer.apply(variables, x), expected)
    assert params["query_norm"]["scale"].shape == (D // 2,)


def spread(config):
    """Standard deviations of the matrices at initialization."""
    sizes = {"vocab_size": 64, "context": 4, "d_model": 64, "n_layers": 2, "n_heads": 2}
    model = TransformerLM(TransformerConfig(**sizes, **config))
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), int))["params"]
    block = params["block_01"]
    return {
        "embed": float(params["embed"]["embedding"].std()),
        "qkv": float(block["attention"]["qkv"]["kernel"].std()),
        "out": float(block["attention"]["out"]["kernel"].std()),
        "up": float(block["ffn"]["up"]["kernel"].std()),
        "down": float(block["ffn"]["down"]["kernel"].std()),
    }


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("gpt2", {"qkv": 0.02, "out": 0.01, "up": 0.02, "down": 0.01}),
        pytest.param(
            "fan_in",
            {"qkv": 1 / 8, "out": 1 / 16, "up": 1 / 8, "down": 1 / 16},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_initialization_has_the_spread_it_says(init, expected):
    found = spread({"ffn": "dense", "ffn_width": 256, "init": init})
    assert found == pytest.approx({"embed": 0.02, **expected}, rel=0.05)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm": "batch"}, "norm must be one of layer, rms"),
        ({"positions": "none"}, "positions must be one of learned, rotary"),
        ({"init": "zero"}, "init must be one of gpt2, fan_in"),
        ({"positions": "rotary", "d_model": 6, "n_heads": 2}, "must be even"),
        ({"attention": "flash"}, "attention must be one of auto, xla, cudnn"),
    ],
)
def test_a_body_that_cannot_be_is_refused_by_name(no_type_hook, values, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**values)


def test_rotary_attention_of_an_odd_head_is_refused_by_name():
    layer = CausalSelfAttention(6, 2, rotary=True)
    with pytest.raises(ValueError, match=r"must be even with rotary=True\. Got 3"):
        layer.init(jax.random.key(0), jnp.zeros((1, 2, 6)))


def test_documents_without_a_mark_are_refused():
    model = TransformerLM(TransformerConfig(**SIZES, document_mask=True))
    with pytest.raises(ValueError, match="end_token must be set"):
        model.init(jax.random.key(0), LINE)


def test_segments_are_refused_where_later_calls_count_documents():
    how = {"document_mask": True, "end_token": END}
    model = TransformerLM(TransformerConfig(**SIZES, **BODIES["dense"], **how))
    variables = jax.eval_shape(model.init, jax.random.key(0), LINE)
    call = functools.partial(model.apply, decode=True, mutable=["cache"])
    with pytest.raises(ValueError, match="must be left out to decode"):
        jax.eval_shape(call, variables, LINE, segment_ids=np.ones(LINE.shape, int))


def test_an_empty_sequence_gives_an_empty_output():
    layer = CausalSelfAttention(D, 2, rotary=True)
    variables = jax.jit(layer.init)(jax.random.key(0), np.zeros((2, 3, D)))
    assert jax.jit(layer.apply)(variables, np.zeros((2, 0, D))).shape == (2, 0, D)


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["dense", "sparse"])
def test_computing_blocks_again_gives_the_gradients_in_less_memory(ffn):
    sizes = {"vocab_size": 11, "context": 64, "d_model": 16, "n_layers": 4}
    found, held = {}, {}
    tokens = np.arange(2 * 64).reshape(2, 64) % 11
    for remat in (False, True):
        model = TransformerLM(TransformerConfig(ffn=ffn, remat=remat, **sizes))
        variables = jax.jit(model.init)(jax.random.key(0), tokens)

        def loss(params, model=model, variables=variables):
            given = {**variables, "params": params}
            (logits, _, aux), new = model.apply(
                given, tokens, True, mutable=["routing"]
            )
            return jnp.square(logits).mean() + aux["total_aux"], new

        grad = (
            jax.jit(jax.grad(loss, has_aux=True)).lower(variables["params"]).compile()
        )
        held[remat] = grad.memory_analysis().temp_size_in_bytes
        found[remat] = grad(variables["params"])
    assert held[True] < 0.6 * held[False]
    jax.tree.map(assert_near, found[True], found[False])


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({}, None),
        ({"dtype": jnp.float16, "capability": "8.0", "width": 128}, None),
        ({"width": 256}, None),
        ({"platform": "cpu", "capability": ""}, "cuDNN needs a CUDA GPU. This is cpu."),
        ({"capability": "gfx942"}, "cuDNN needs a CUDA GPU. This is gpu gfx942."),
        (
            {"capability": "7.5"},
            "its attention needs compute capability 8.0. This is 7.5.",
        ),
        (
            {"dtype": jnp.float32},
            "its attention takes bfloat16 and float16. Got float32.",
        ),
        ({"capability": "8.6", "width": 136}, "at most 128. Got 136."),
        ({"width": 12}, "heads must be a multiple of 8 wide, at most 256. Got 12."),
        ({"is_plain": False}, "it takes no mask and no segments here."),
    ],
)
def test_cudnn_attention_runs_where_it_says(how, reason):
    where = {"platform": "gpu", "capability": "9.0", "dtype": jnp.bfloat16, "width": 64}
    found = cudnn.unsupported_reason(**{**where, "is_plain": True, **how})
    assert found == reason if reason is None else found.endswith(reason)


def test_cudnn_by_name_where_it_does_not_run_is_refused():
    layer = CausalSelfAttention(D, 2, implementation="cudnn")
    with pytest.raises(
        NotImplementedError, match=r"'cudnn': cuDNN needs .* This is cpu\."
    ):
        layer.init(jax.random.key(0), jnp.zeros((1, 2, D), jnp.bfloat16))


@pytest.mark.slow
def test_what_cudnn_is_asked_for_is_what_xla_computes(monkeypatch, no_type_hook):
    """Asked on a GPU that is not here; XLA answers in its place."""
    layers = {
        name: CausalSelfAttention(D, 2, implementation=name) for name in ("auto", "xla")
    }
    x = jax.random.normal(jax.random.key(0), (2, 5, D), jnp.bfloat16)
    mask = jnp.ones((2, 5), bool)
    variables = jax.jit(layers["xla"].init)(jax.random.key(1), x)
    expected = layers["xla"].apply(variables, x)
    asked, attention = [], jax.nn.dot_product_attention

    def xla(*args, implementation, **how):
        asked.append(implementation)
        return attention(*args, implementation="xla", **how)

    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0"
    )
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert_near(layers["auto"].apply(variables, x), expected, 2**-6)
    assert asked == ["cudnn"]
    layers["xla"].apply(variables, x)
    layers["auto"].apply(variables, x, mask=mask)
    layers["auto"].apply(variables, x.astype(jnp.float32))
    assert asked == ["cudnn"]


TILES = [("up", "kernel"), ("down", "kernel")]


@pytest.mark.parametrize("ffn", ["sparse", "hierarchical"])
def test_tiles_of_the_original_s_rule_start_above_its_threshold(ffn):
    """Drawn at 0.02 they would all be zero, and never move."""
    ternary = TernaryConfig(rule="fixed")
    config = TransformerConfig(
        vocab_size=9, context=8, d_model=16, n_layers=1, n_heads=2, num_tiles=4,
        tiles_per_cluster=2, ffn=ffn, ternary=ternary,
    )  # fmt: skip
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(TransformerLM(config).init)(jax.random.key(0), tokens)["params"]
    flat = traverse_util.flatten_dict(params)
    kernels = [leaf for path, leaf in flat.items() if path[-2:] in TILES]
    assert len(kernels) == 2
    for kernel in kernels:
        q = hard_ternary(kernel, ternary).q
        assert 0.2 < (q != 0).mean() < 0.8
