"""Settings go where they belong, and parameters keep the names that saved runs have."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from trix_jax import (
    HierarchicalTriXBlock,
    HierarchicalTriXFFN,
    RoutingConfig,
    SparseLookupBlock,
    SparseLookupFFN,
    SparseTriXBlock,
    SparseTriXFFN,
    TernaryConfig,
    TransformerConfig,
    TransformerLM,
)
from trix_jax.nn import DenseBlock, DenseFFN

D = 16
FFN_OF = {
    HierarchicalTriXBlock: HierarchicalTriXFFN,
    SparseTriXBlock: SparseTriXFFN,
    SparseLookupBlock: SparseLookupFFN,
    DenseBlock: DenseFFN,
}
# None of these is a default, so that one which a block forgets to pass is seen.
ARGUMENTS = {
    "d_hidden": 6,
    "num_tiles": 8,
    "expansion": 2,
    "tiles_per_cluster": 4,
    "top_k_clusters": 2,
    "tiles_per_token": 2,
    "grid_size": 3,
    "compress_hidden": 5,
    "ternary_splines": False,
    "reads": "own",
    "width": 24,
    "dropout": 0.25,
    "activation": "silu",
    "ternary": TernaryConfig(rule="threshold"),
    "routing": RoutingConfig(gate="none"),
    "up_init": jax.nn.initializers.ones,
    "down_init": jax.nn.initializers.zeros,
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "axis_name": "data",
    "tile_axis": "tile",
    "implementation": "xla",
}


def arguments_of(layer):
    names = {field.name for field in dataclasses.fields(layer)}
    return {n: getattr(layer, n) for n in names & ARGUMENTS.keys()}


# Of two kinds of lookup each refuses what only the other has.
LOOKUPS = {"own": {"compress_hidden"}, "shared": {"reads", "ternary"}}
BLOCKS = [
    *((block, set()) for block in FFN_OF if block is not SparseLookupBlock),
    *((SparseLookupBlock, others) for others in LOOKUPS.values()),
]


@pytest.mark.parametrize(("block", "others"), BLOCKS)
def test_every_argument_of_a_block_reaches_its_ffn_and_the_tiles(block, others):
    taken = {field.name for field in dataclasses.fields(block)} & ARGUMENTS.keys()
    taken -= others
    layer, modules = block(D, 2, **{n: ARGUMENTS[n] for n in taken}), {}

    def note(call, args, kwargs, context):
        modules[context.module.name] = context.module
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((2, 3, D)))
    assert type(modules["ffn"]) is FFN_OF[block]
    ffn = arguments_of(modules["ffn"])
    ffn = {n: value for n, value in ffn.items() if n not in others}
    assert ffn == {n: ARGUMENTS[n] for n in ffn}
    if block is not DenseBlock:
        settings = arguments_of(modules["router"].settings)
        shared = ffn.keys() & settings.keys()
        assert {n: settings[n] for n in shared} == {n: ffn[n] for n in shared}


STATE = {"bias", "margins", "signature", "frozen"}
CLUSTERS = STATE | {"members", "cluster_bias", "cluster_margins"}
TILED = {"tiles/up/kernel", "tiles/down/kernel"}
FFN_PATHS = {
    "dense": ({"up/kernel", "down/kernel"}, set()),
    "sparse": (TILED, {f"tiles/router/{name}" for name in STATE}),
    "hierarchical": (
        TILED | {"norm/scale", "output_scale"},
        {f"tiles/router/{name}" for name in CLUSTERS},
    ),
    "lookup": (
        {"norm/scale", "norm/bias", "directions", "output_scale"}
        | {"splines/kernel", "spline_scale"}
        | {
            f"compress_{end}/{of}" for end in ("in", "out") for of in ("kernel", "bias")
        },
        {f"router/{name}" for name in CLUSTERS},
    ),
}


FFN_PATHS["lookup_own"] = (
    {"norm/scale", "norm/bias", "tile_read/kernel", "tile_write/kernel", "output_scale"}
    | {"splines/kernel", "spline_scale"},
    FFN_PATHS["lookup"][1],
)


@pytest.mark.parametrize("ffn", FFN_PATHS)
def test_paths_of_variables_stay_what_saved_runs_have(ffn):
    sizes = {"vocab_size": 11, "d_model": D, "n_layers": 1, "grid_size": 3}
    kind, _, reads = ffn.partition("_")
    sizes |= {"reads": reads} if reads else {}
    model = TransformerLM(TransformerConfig(ffn=kind, tied=False, **sizes))
    tokens = jnp.zeros((2, 3), int)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    params, state = FFN_PATHS[ffn]
    attention = {"attention/qkv/kernel", "attention/out/kernel"}
    block = attention | {"attention_norm/scale", "ffn_norm/scale"}
    block |= {f"ffn/{path}" for path in params}
    outside = {"embed/embedding", "positions/embedding", "norm/scale", "head/kernel"}
    expected = outside | {f"block_00/{path}" for path in block}
    assert set(flatten_dict(shapes["params"], sep="/")) == expected
    found = set(flatten_dict(shapes.get("routing", {}), sep="/"))
    assert found == {f"block_00/ffn/{path}" for path in state}


def test_a_hash_takes_as_many_tiles_as_there_are_whatever_the_clusters():
    clusters = {"num_tiles": 8, "tiles_per_cluster": 2, "tiles_per_token": 7}
    config = {"ffn": "hierarchical", "d_model": D, "n_heads": 2, **clusters}
    hashed = TransformerConfig(**config, routing=RoutingConfig(source="hash"))
    tokens = jnp.zeros((1, 4), jnp.int32)
    model = TransformerLM(dataclasses.replace(hashed, vocab_size=8, context=4))
    (_, infos, _), _ = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), tokens)
    )
    assert infos[0].tiles.shape == (1, 4, 7)
    with pytest.raises(ValueError, match="top_k_clusters \\* tiles_per_cluster=2"):
        TransformerConfig(**config)
