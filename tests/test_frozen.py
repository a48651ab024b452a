"""A frozen model computes, bit for bit, what its fake-quantized original did."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from optimized import jit

from trix_jax import (
    HierarchicalTriXFFN,
    SparseLookupFFN,
    SparseTriXFFN,
    TernaryConfig,
    TransformerConfig,
    TransformerLM,
    TriXLinear,
    freeze,
    ternary_once,
    widen,
)
from trix_jax.interop.safetensors import to_tensors

D = 256  # two groups of 128, in both products
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, D)), jnp.float32)
CONFIGS = {
    "absmean-tile": TernaryConfig(),
    "absmean-channel": TernaryConfig(granularity="channel"),
    "absmean-group": TernaryConfig(granularity="group"),
    "threshold-tile": TernaryConfig(rule="threshold"),
    "threshold-channel": TernaryConfig(rule="threshold", granularity="channel"),
    "threshold-group": TernaryConfig(rule="threshold", granularity="group"),
    "fixed": TernaryConfig(rule="fixed"),
    "progressive": TernaryConfig(mode="progressive"),
}
QUICK = ("absmean-tile", "threshold-channel", "fixed", "progressive")


def layer(kind, config=CONFIGS["absmean-tile"]):
    return {
        "sparse": SparseTriXFFN(
            D, num_tiles=2, expansion=2, tiles_per_token=2, ternary=config
        ),
        "hierarchical": HierarchicalTriXFFN(
            D, D, num_tiles=4, tiles_per_cluster=2, ternary=config
        ),
        "linear": TriXLinear(10, num_tiles=2, use_bias=True, ternary=config),
        "lookup": SparseLookupFFN(D, num_tiles=4, tiles_per_cluster=2, grid_size=3),
        "lookup_own": SparseLookupFFN(
            D,
            num_tiles=8,
            tiles_per_cluster=4,
            grid_size=2,
            tiles_per_token=3,
            reads="own",
            ternary=config,
        ),
    }[kind]


def random_variables(model, *args, seed=0):
    """Variables of the shapes that `init` gives, disturbed as training would; cheaper
    than to compile `init`.
    """
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if leaf.dtype != jnp.float32:
            return jnp.zeros(leaf.shape, leaf.dtype)
        # Wide enough for the fixed rule's threshold of 0.5.
        values = 0.6 * rng.normal(size=leaf.shape)
        if path[-1].key == "scale" or leaf.shape == ():
            values = 0.1 + 0.02 * values
        return jnp.asarray(values, jnp.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    variables = jax.tree.map_with_path(fill, shapes)
    for path, state in flatten_dict(
        variables.get("routing", {}), is_leaf=lambda _, node: "bias" in node
    ).items():
        del path
        state["bias"] = 0.1 * state["bias"]
        if "members" in state:
            count = np.prod(state["members"].shape[-2:])
            flat = np.random.default_rng(1).permutation(count)
            state["members"] = jnp.broadcast_to(
                jnp.asarray(flat.reshape(state["members"].shape[-2:]), jnp.int32),
                state["members"].shape,
            )
    return variables


def slowly(cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def assert_equal(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def assert_packed(frozen, kernels):
    params = flatten_dict(frozen["params"], sep="/")
    packed = flatten_dict(frozen["packed"], sep="/")
    bits = {name for name in packed if name.endswith("bits")}
    assert {name.removesuffix("/bits") for name in bits} == kernels
    for name in kernels:
        assert f"{name}/kernel" not in params
        assert packed[f"{name}/bits"].dtype == jnp.uint8
        assert packed[f"{name}/scale"].dtype == jnp.bfloat16


KERNELS = {
    "sparse": {"tiles/up", "tiles/down"},
    "hierarchical": {"tiles/up", "tiles/down"},
    "linear": {"kernel"},
    "lookup": {"splines"},
    "lookup_own": {"splines", "tile_read", "tile_write"},
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        *[("linear", name) for name in QUICK],
        *slowly(("linear", name) for name in CONFIGS if name not in QUICK),
        *slowly([("lookup", "fixed")]),
        *slowly(("lookup_own", name) for name in ("absmean-tile", "threshold-tile")),
        *slowly(("sparse", name) for name in CONFIGS),
        *slowly(("hierarchical", name) for name in QUICK[:2]),
    ],
)
def test_frozen_layer_equals_the_jitted_fake_quantized_one(kind, config):
    model = layer(kind, CONFIGS[config])
    variables = random_variables(model, X)
    frozen = freeze(model, variables, X)
    assert_packed(frozen, KERNELS[kind])
    assert frozen.get("routing") is variables.get("routing")
    call = jit(functools.partial(model.apply, progress=1.0))
    expected = call(variables, X)
    assert np.abs(jax.tree.leaves(expected)[0]).max() > 1e-3
    assert_equal(call(frozen, X), expected)


@pytest.mark.slow
def test_frozen_groups_without_jit_equal_the_jitted_ones():
    # A compiler that fuses the products of groups with their sum would change the last
    # bit.
    model = layer("linear", CONFIGS["threshold-group"])
    variables = random_variables(model, X)
    y = model.apply(freeze(model, variables, X), X)
    expected = jit(model.apply)(variables, X)
    assert_equal(y, expected)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, *slowly([(40,)])])
def test_frozen_layer_equals_with_few_and_many_blocks(tokens):
    # Fewer blocks than tiles gather packed bytes, more unpack all tiles first.
    model = HierarchicalTriXFFN(16, 10, num_tiles=8, tiles_per_cluster=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(tokens, 16)), jnp.float32)
    variables = random_variables(model, x)
    frozen = freeze(model, variables, x)
    assert_equal(jit(model.apply)(frozen, x), jit(model.apply)(variables, x))


def test_packed_tensors_are_a_sixteenth_of_float32():
    model = layer("sparse")
    variables = random_variables(model, X)
    frozen = freeze(model, variables, X)
    bits = [a for a in jax.tree.leaves(frozen["packed"]) if a.dtype == jnp.uint8]
    kernels = jax.tree.leaves(variables["params"])
    assert 16 * sum(a.nbytes for a in bits) == sum(a.nbytes for a in kernels)


TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, 11, (2, 9)))


def language_model(ffn, **kwargs):
    return TransformerLM(
        TransformerConfig(
            vocab_size=11,
            context=9,
            d_model=16,
            n_layers=1,
            n_heads=2,
            ffn=ffn,
            num_tiles=4,
            tiles_per_cluster=2,
            grid_size=3,
            **kwargs,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["hierarchical", "sparse", "lookup"])
def test_frozen_language_model_equals_the_jitted_one(ffn):
    model = language_model(ffn)
    variables = random_variables(model, TOKENS)
    frozen = freeze(model, variables, TOKENS)
    kind = KERNELS[ffn]
    assert_packed(frozen, {f"block_00/ffn/{k}" for k in kind})
    assert_equal(jit(model.apply)(frozen, TOKENS), jit(model.apply)(variables, TOKENS))


class Scanned(nn.Module):
    """Two layers under `nn.scan`."""

    make: object

    @nn.compact
    def __call__(self, x):
        make = self.make

        class Step(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y, info, _ = make(name="ffn")(x)
                return x + y, info.tiles

        axes = {"params": 0, "routing": 0, "packed": 0}
        scan = nn.scan(Step, variable_axes=axes, split_rngs={"params": True}, length=2)
        return scan(name="steps")(x, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        (
            "hierarchical",
            functools.partial(
                HierarchicalTriXFFN,
                16,
                10,
                num_tiles=4,
                tiles_per_cluster=2,
                ternary=TernaryConfig(rule="fixed"),
            ),
        ),
        *slowly(
            [
                (
                    "lookup",
                    functools.partial(
                        SparseLookupFFN,
                        16,
                        num_tiles=4,
                        tiles_per_cluster=2,
                        grid_size=3,
                    ),
                )
            ]
        ),
    ],
)
def test_frozen_scanned_layers_equal_the_jitted_ones(kind, make):
    model, x = Scanned(make), X[..., :16]
    variables = random_variables(model, x)
    frozen = freeze(model, variables, x)
    assert_packed(frozen, {f"steps/ffn/{name}" for name in KERNELS[kind]})
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(frozen["packed"]))
    assert_equal(jit(model.apply)(frozen, x), jit(model.apply)(variables, x))


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return x + SparseTriXFFN(16, 4, self.width, 2, name="ffn")(nn.LayerNorm()(x))[0]


class BlockJittedInside(nn.Module):
    width: int

    @nn.jit
    @nn.compact
    def __call__(self, x):
        return x + SparseTriXFFN(16, 4, self.width, 2, name="ffn")(nn.LayerNorm()(x))[0]


class EqualBlocks(nn.Module):
    """Three blocks of two configurations: `nn.jit` traces two of them."""

    make: object

    @nn.compact
    def __call__(self, x):
        for number, width in enumerate((2, 4, 2)):
            x = self.make(width, name=f"block_{number}")(x)
        return x


@pytest.mark.slow
@pytest.mark.parametrize("make", [BlockJittedInside, nn.jit(Block)])
def test_of_equal_blocks_under_jit_every_one_is_packed(make):
    model, x = EqualBlocks(make), X[0, :, :16]
    variables = random_variables(model, x)
    frozen = freeze(model, variables, x)
    made = ternary_once(model, variables, x)["ternary"]
    for number in range(3):
        tiles = frozen["packed"][f"block_{number}"]["ffn"]["tiles"]
        assert {"up", "down", "signature_sums"} == set(tiles)
        assert set(made[f"block_{number}"]["ffn"]["tiles"]) == {"up", "down"}
    assert not [p for p in flatten_dict(frozen["params"]) if p[-1] == "kernel"]
    assert_equal(jit(model.apply)(frozen, x), jit(model.apply)(variables, x))


@pytest.mark.parametrize(
    "kind", ["linear", *slowly([("sparse",), ("hierarchical",), ("lookup",)])]
)
def test_a_byte_a_weight_gives_the_bits_of_two_bits(kind):
    """One token and many; 10 outputs, of which the words of 4 have a rest."""
    narrow = HierarchicalTriXFFN(16, 10, num_tiles=8, tiles_per_cluster=2)
    model = narrow if kind == "hierarchical" else layer(kind)
    x = X[..., : model.d_model] if kind == "hierarchical" else X
    frozen = freeze(model, random_variables(model, x), x)
    wide = widen(frozen)
    assert frozen["params"] is wide["params"]
    call = jit(model.apply)
    for tokens in (x[:1, :1], x):
        assert_equal(call(wide, tokens), call(frozen, tokens))
    bits, wider = (flatten_dict(v["packed"], sep="/") for v in (frozen, wide))
    for name, leaf in wider.items():
        if name.endswith("bits"):
            assert leaf.dtype == jnp.int8
            assert leaf.nbytes == 4 * bits[name].nbytes
        else:
            assert leaf is bits[name]
    assert_equal(widen(wide)["packed"], wide["packed"])


def test_a_byte_a_weight_is_exported_as_two_bits():
    model = language_model("hierarchical")
    frozen = freeze(model, random_variables(model, TOKENS), TOKENS)
    expected, found = (to_tensors(model, v) for v in (frozen, widen(frozen)))
    assert found[1] == expected[1]
    assert_equal(found[0], expected[0])


def test_widening_what_is_not_packed_or_packed_for_a_gpu_is_refused():
    with pytest.raises(ValueError, match="freeze the model first"):
        widen({"params": {}})
    planar = {"bits": jnp.zeros((1, 2, 16), jnp.uint16), "scale": jnp.ones((1, 1, 1))}
    with pytest.raises(ValueError, match="take no bytes"):
        widen({"params": {}, "packed": {"up": planar}})


def test_freezing_twice_is_refused():
    model = layer("linear")
    frozen = freeze(model, random_variables(model, X), X)
    with pytest.raises(ValueError, match="frozen already"):
        freeze(model, frozen, X)


@pytest.mark.parametrize("kind", ["sparse", "hierarchical", "linear"])
def test_freezing_a_layer_with_real_weights_is_refused(kind):
    model = layer(kind, TernaryConfig(mode="none"))
    with pytest.raises(ValueError, match="mode='none'"):
        freeze(model, random_variables(model, X), X)


def test_freezing_weights_that_never_are_ternary_is_warned_of():
    layer = TriXLinear(16, ternary=TernaryConfig(mode="soft"))
    x = X[0, :, :16]
    variables = layer.init(jax.random.key(0), x)
    with pytest.warns(UserWarning, match="training ends between the ternary values"):
        freeze(layer, variables, x)


def test_freezing_a_model_without_ternary_weights_is_refused():
    dense = language_model("dense")
    with pytest.raises(ValueError, match="TransformerLM holds no ternary weights"):
        freeze(dense, random_variables(dense, TOKENS), TOKENS)
    lookup = language_model("lookup", ternary_splines=False)
    with pytest.raises(ValueError, match="holds no ternary weights"):
        freeze(lookup, random_variables(lookup, TOKENS), TOKENS)


def test_frozen_parameters_keep_what_is_not_ternary():
    model = layer("hierarchical")
    variables = random_variables(model, X)
    frozen = freeze(model, variables, X)
    assert set(flatten_dict(frozen["params"], sep="/")) == {
        "norm/scale",
        "output_scale",
    }
    assert "kernel" in variables["params"]["tiles"]["up"]
