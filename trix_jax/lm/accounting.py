"""What a model costs: parameters, active compute and served bits of its FFNs, counted
from the config alone.
"""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from trix_jax.nn.route_table import layers_by_token, table_shapes
from trix_jax.nn.sparse_lookup_ffn import compress_width
from trix_jax.nn.transformer import TransformerConfig, TransformerLM

SCALE_BITS = 16
FLOAT_BITS = 16

Routes = Literal["signatures", "table"]  # how a served model finds a token's tiles


class Costs(NamedTuple):
    """Sizes of a model; those of the FFNs are summed over its layers, the dense part
    beside tiles included.

    Attributes:
        total: parameters of the whole model.
        ffn: parameters of the FFNs, their norms and scales included.
        ffn_active: multiply-accumulates of the FFNs per token in evaluation and serving,
            routing scores included: with clusters `C + top_k_clusters * N / C` scores,
            by a hash none.
        ffn_bits: bits of the FFN weights as served: ternary at 2, in whole bytes for each
            output of a kernel, plus scales, everything else at 16.
        ffn_active_training: `ffn_active` of a forward pass in training, where a balance
            loss over all tiles needs their scores: with clusters `C + N`, by a hash none.
        routing_bits: bits that routing stores beside the FFN weights as served, at 16 a
            number: signatures, biases, clusters and, where scores are held, the copy of
            the embedding's rows. A hash stores nothing, a learned router's rows are
            FFN weights. Tables of routes stand in place of the signatures and rows, with
            the bits of their whole numbers as stored.
    """

    total: int
    ffn: int
    ffn_active: int
    ffn_bits: int
    ffn_active_training: int
    routing_bits: int = 0


def costs(config: TransformerConfig, routes: Routes = "signatures") -> Costs:
    """Counts a model's costs; the parameters are those that `init` would make.

    Args:
        routes: "table" is served with `tabulate_routes`, whose layers score nothing.

    Raises:
        ValueError: a table for a model that does not route by single tokens.
    """
    tables = layers_by_token(config) if routes == "table" else 0
    params = _param_shapes(config)
    blocks = [layer for name, layer in params.items() if name.startswith("block_")]
    ffn = [block["ffn"] for block in blocks]
    shared = sum(_size(block.get("shared", {})) for block in blocks)
    return Costs(
        total=_size(params),
        ffn=sum(_size(layer) for layer in ffn) + shared,
        ffn_active=config.n_layers * _active(config) - tables * _scoring(config),
        ffn_bits=sum(_bits(layer, config) for layer in ffn) + FLOAT_BITS * shared,
        ffn_active_training=config.n_layers * _active(config, training=True),
        routing_bits=_routing_bits(config, tables),
    )


def match_params(config: TransformerConfig, reference: TransformerConfig) -> int:
    """Width of the dense FFN at which `config` has as many parameters as `reference`,
    to the nearest unit.
    """
    return _match("total", config, _costs(reference).total)


def match_active(config: TransformerConfig, reference: TransformerConfig) -> int:
    """Width of the dense FFN with the FFN multiply-accumulates of `reference`."""
    return _match("ffn_active", config, _costs(reference).ffn_active)


def match_bits(config: TransformerConfig, reference: TransformerConfig) -> int:
    """Width of the dense FFN with the bits that the FFNs of `reference` and their routing
    take as served (`ffn_bits + routing_bits`, with signatures and no table), at 16 a
    weight.

    Raises:
        ValueError: the routing of `reference` keeps a row for each id, and it has no
            vocabulary.
    """
    by_id = (
        reference.routing.hold != "signatures" and reference.routing.source != "hash"
    )
    if reference.vocab_size is None and by_id:
        raise ValueError(
            f"match-bits counts what routing.hold={reference.routing.hold!r} stores, a "
            "row for each id of the vocabulary: give model.vocab_size."
        )
    cost = _costs(reference)
    return _match("ffn_bits", config, cost.ffn_bits + cost.routing_bits)


def _match(cost: str, config: TransformerConfig, wanted: int) -> int:
    """A dense FFN's costs are linear in its width: two widths tell the third."""
    one, two = (
        getattr(_costs(dataclasses.replace(config, ffn="dense", ffn_width=width)), cost)
        for width in (1, 2)
    )
    return max(1, 1 + round((wanted - one) / (two - one)))


def _costs(config: TransformerConfig) -> Costs:
    """Of a model whose vocabulary need not be known yet, as it costs all the same."""
    return costs(dataclasses.replace(config, vocab_size=config.vocab_size or 1))


MATCHES = {
    "match-params": match_params,
    "match-active": match_active,
    "match-bits": match_bits,
}


def active_width(config: TransformerConfig, routes: Routes = "signatures") -> float:
    """Hidden width of the dense FFN with the same multiply-accumulates per token, of
    layers the mean.
    """
    tables = layers_by_token(config) if routes == "table" else 0
    saved = tables * _scoring(config) / config.n_layers
    return (_active(config) - saved) / (2 * config.d_model)


@functools.lru_cache(maxsize=256)  # tracing the model takes all of the time of counting
def _param_shapes(config):
    # Who attends to whom has no parameters, and needs an end mark.
    config = dataclasses.replace(config.on_any_device(), document_mask=False)
    model = TransformerLM(config)
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    return jax.eval_shape(lambda t: model.init(jax.random.key(0), t), tokens)["params"]


def _size(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _active(c: TransformerConfig, training: bool = False) -> int:
    if c.ffn == "dense":
        return 2 * c.d_model * c.dense_width
    always = _scoring(c, training) + 2 * c.d_model * c.shared_width
    if c.ffn == "lookup" and c.reads == "own":
        return always + c.tiles_per_token * (2 * c.d_model + 1)
    if c.ffn == "lookup":
        hidden = compress_width(c.d_model, c.compress_hidden)
        return always + (c.d_model + 2) * hidden + c.tiles_per_token * (2 + c.d_model)
    return always + 2 * c.d_model * c.tile_width * c.tiles_per_token


def _scoring(c: TransformerConfig, training: bool = False) -> int:
    """Multiply-accumulates of a layer's scores for a token; a hash has none."""
    if c.routing.source == "hash":
        return 0
    if c.ffn == "lookup" or c.ffn == "hierarchical":
        clusters = c.num_tiles // c.tiles_per_cluster
        scores_all = training and c.routing.balance_over == "all"
        looked_at = clusters if scores_all else c.top_k_clusters
        scores = clusters + looked_at * c.tiles_per_cluster
    else:
        scores = c.num_tiles
    return c.d_model * scores


def _routing_bits(c: TransformerConfig, tables: int) -> int:
    """What routing stores: a table in each of so many layers, in the others signatures,
    and the rows that these share.
    """
    if c.ffn == "dense" or c.routing.source == "hash":
        return 0
    table = sum(_stored_bits(shape) for shape in table_shapes(c).values())
    n, has_clusters = c.num_tiles, c.ffn in ("hierarchical", "lookup")
    # A lookup's signatures are rows of its directions, or of what its tiles read by,
    # which are FFN weights.
    is_read = c.ffn == "lookup" and c.routing.source == "weights"
    is_learned = c.routing.source == "learned"  # its rows are FFN weights too
    is_stored = not is_learned and (c.routing.holds or not is_read)
    layer = n + (n + n // c.tiles_per_cluster if has_clusters else 0)
    layer += n * c.d_model if is_stored else 0
    copied = c.routing.hold != "signatures" and not tables
    rows = (c.vocab_size or 0) * c.d_model if copied else 0
    return tables * table + FLOAT_BITS * ((c.n_layers - tables) * layer + rows)


def _stored_bits(shape: jax.ShapeDtypeStruct) -> int:
    is_real = jnp.issubdtype(shape.dtype, jnp.floating)
    return shape.size * (FLOAT_BITS if is_real else 8 * shape.dtype.itemsize)


def _bits(layer, c: TransformerConfig) -> int:
    kernels = _kernels(layer, c)
    if not kernels:
        return FLOAT_BITS * _size(layer)
    shapes = [kernel["kernel"].shape for kernel, _ in kernels]
    ternary = sum(map(math.prod, shapes))
    packed = 4 * sum(_packed_bytes(*shape) for shape in shapes)
    scales = sum(number for _, number in kernels)
    learned = _size([kernel["scale"] for kernel, _ in kernels if "scale" in kernel])
    rest = _size(layer) - ternary - learned
    return 2 * packed + SCALE_BITS * scales + FLOAT_BITS * rest


def _packed_bytes(*shape: int) -> int:
    """Of a kernel `[*N, I, O]` in a file: four weights a byte, each output's inputs from
    a byte of their own on.
    """
    *tiles, inputs, outputs = shape
    return math.prod(tiles) * outputs * math.ceil(inputs / 4)


def _kernels(layer, c: TransformerConfig) -> list[tuple[dict, int]]:
    """The ternary kernels of a layer, and how many scales each has as served."""
    found = []
    if c.has_ternary_products and c.ternary.mode != "none":
        names = ("tile_read", "tile_write") if c.ffn == "lookup" else ("up", "down")
        inside = layer if c.ffn == "lookup" else layer["tiles"]
        found = [(inside[name], _scales(inside[name]["kernel"], c)) for name in names]
    if c.ffn == "lookup" and c.ternary_splines:  # the tiles' own scales are real ones
        found.append((layer["splines"], 1))
    return found


def _scales(kernel, c: TransformerConfig) -> int:
    *tiles, rows, columns = kernel.shape
    per_matrix = {"tile": 1, "channel": columns}.get(c.ternary.granularity)
    if c.ternary.rule == "fixed":
        per_matrix = columns
    if per_matrix is None:
        per_matrix = columns * max(1, rows // c.ternary.group_size)
    return math.prod(tiles) * per_matrix
