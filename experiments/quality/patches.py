"""Ablations that no flag of the library has: what each replaces in it, in the process of
its run (`patched`) and nowhere else.

An idea is tried from here first and gets an option only where it wins; most lose, and the
library stays as small as it was. All but those of the lookup act on the flat layer's training path; a
patched run is evaluated under its patch and is not meant to be exported.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from trix_jax import hashing, routing
from trix_jax.lm import accounting
from trix_jax.lm.train import optimizer
from trix_jax.nn import activations, block, kernel, router, sparse_lookup_ffn, tiles
from trix_jax.nn.sparse_lookup_ffn import SparseLookupFFN, compress_width

EMA = 0.99  # share of the old signature that a step keeps
POWER_STEPS = 8
CODES = 1024  # token ids that have a vector of their own


def unit(x):
    return routing.rms_unit(x.astype(jnp.float32))


def without_gradient(sums, kind: routing.Signature = "sum"):
    """The task's gradient reaches the routing's scores, not the signatures."""
    return jax.lax.stop_gradient(SIGNATURES(sums, kind))


def raw_scores(h, signature, scale=1.0):
    """A token's size matters: `h @ signature / sqrt(D)`, not `rms_unit(h)`."""
    return h.astype(jnp.float32) @ signature.T * (scale / h.shape[-1] ** 0.5)


def centred_scores(h, signature, scale=1.0):
    """The mean token of the call is taken off first. The balance bias can hold what this
    takes off a tile's scores, `signature . mean(h)`; the gate cannot.
    """
    h = h.astype(jnp.float32)
    return MATCH(h - h.mean(axis=0, keepdims=True), signature, scale)


class SlowRouter(router.Router):
    """Signatures are moving averages of those of the weights."""

    def __call__(self, h, signature, train=False, token_ids=None):
        if self.has_variable("routing", "signature"):
            old = jax.lax.stop_gradient(self.get_variable("routing", "signature"))
            signature = EMA * old + (1 - EMA) * signature
        return super().__call__(h, signature, train, token_ids)


class ByTokenRouter(router.Router):
    """Keeps the token ids for what chooses tiles."""

    def __call__(self, h, signature, train=False, token_ids=None):
        object.__setattr__(self, "ids", token_ids)
        return super().__call__(h, signature, train, token_ids)


class HashedWithGates(ByTokenRouter):
    """Tiles by token id, as the control "hash" has them, and the gates that routing by
    signatures would give those tiles.
    """

    def _select(self, scores, h, signature, state):
        del h, signature, state
        s = self.settings
        chosen = hashing.hash_tiles(self.ids, s.num_tiles, s.tiles_per_token)
        gates = routing.gates(scores, chosen, s.routing.gate)
        return chosen, gates, router.Seen(scores)


class HalfHashed(ByTokenRouter):
    """Half of the tiles by token id, without a gate, the others by signature."""

    def _select(self, scores, h, signature, state):
        del h, signature
        s = self.settings
        half = s.tiles_per_token // 2
        hashed = hashing.hash_tiles(self.ids, s.num_tiles, half)
        biased = jax.lax.stop_gradient(scores) + state["bias"].value[None]
        is_taken = (hashed[..., None] == jnp.arange(s.num_tiles)[None, None]).any(1)
        biased = jnp.where(is_taken, -jnp.inf, biased)
        matched = routing.select_tiles(biased, s.tiles_per_token - half)
        self._add_margins(state, "margins", biased, matched)
        gates = routing.gates(scores, matched, s.routing.gate)
        opened = jnp.concatenate([jnp.ones(hashed.shape, gates.dtype), gates], axis=1)
        chosen = jnp.concatenate([hashed, matched], axis=1)
        return chosen, opened, router.Seen(scores)


class TokenRouter(router.Router):
    """Signatures meet a fixed random vector of the token id, not the hidden state."""

    def __call__(self, h, signature, train=False, token_ids=None):
        codes = jax.random.normal(jax.random.key(0), (CODES, h.shape[-1]), h.dtype)
        return super().__call__(
            codes[jnp.asarray(token_ids) % CODES], signature, train, token_ids
        )


def with_the_token_before(share: float) -> Callable:
    """Signatures meet the token's row of the embedding table and, at `share` of its size,
    the row of the token before: routes by pairs of tokens, as still as those by token.
    """

    def router_tokens(tokens, router_input):
        if router_input is None:
            return ROUTER_TOKENS(tokens, None)
        zeros = jnp.zeros_like(router_input[..., :1, :])
        before = jnp.concatenate([zeros, router_input[..., :-1, :]], axis=-2)
        return ROUTER_TOKENS(tokens, unit(router_input) + share * unit(before))

    return router_tokens


def principal_direction(module, up, axis):
    """The first left singular vector of a tile's up-projection, on the side of the sum."""
    del module, axis
    direction = up.q.sum(axis=-1)
    for _ in range(POWER_STEPS):
        hidden = jnp.einsum("ndf,nd->nf", up.q, unit(direction))
        direction = jnp.einsum("ndf,nf->nd", up.q, hidden) / up.q.shape[-1]
    return direction


class RecordingKernel(kernel.TernaryKernel):
    """Keeps what it gave last, by name, for `both_projections`."""

    given = {}

    def __call__(self, progress=1.0):
        self.given[self.name] = super().__call__(progress)
        return self.given[self.name]


def both_projections(module, up, axis):
    """What a tile reads and what it writes: the sums of both its projections."""
    del module, axis
    down = RecordingKernel.given["down"].q.sum(axis=-2)
    return unit(up.q.sum(axis=-1)) + unit(down)


def with_tile_0(scores, k=1):
    """Tile 0 is every token's; the others are chosen among."""
    return SELECT(scores.at[:, 0].set(jnp.inf), k)


def open_gate_0(scores, chosen, kind, allowed=None):
    return jnp.where(chosen == 0, 1.0, GATES(scores, chosen, kind, allowed))


def gated(x):
    """Computes `silu(a) * b` of a tile's two halves, given to the down-projection twice,
    so that no parameter is idle.
    """
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jax.nn.silu(a) * b] * 2, axis=-1)


def normalised(x):
    """Squared ReLU at unit RMS, over a tile's hidden units."""
    return routing.rms_unit(activations.squared_relu(x)).astype(x.dtype)


class SideBySide(SparseLookupFFN):
    """Four lookups in place of one, each with its own routes, splines, directions and a
    quarter of the compressor: rank four. The compressors take as many
    multiply-accumulates as one did, the routing four times as many. The first one's
    routes are reported.
    """

    @nn.compact
    def __call__(self, x, train=False, **how):
        own = ("compress_hidden", "parent", "name")
        kept = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(SparseLookupFFN)
            if field.name not in own
        }
        width = compress_width(self.d_model, self.compress_hidden) // 4
        parts = [
            SparseLookupFFN(**kept, compress_hidden=width, name=f"part_{i}")(
                x, train, **how
            )
            for i in range(4)
        ]
        outputs, infos, losses = zip(*parts, strict=True)
        mean = jax.tree.map(lambda *each: sum(each) / 4, *losses)
        return sum(outputs), infos[0], mean


def active_side_by_side(config, training=False):
    width = compress_width(config.d_model, config.compress_hidden) // 4
    part = dataclasses.replace(config, compress_hidden=width)
    return 4 * ACTIVE(part, training)


def bits_side_by_side(layer, config):
    return sum(BITS(part, config) for part in layer.values())


def no_magnitude(self, place, route, progress):
    """The lookup gives nothing: what attention alone is worth."""
    return 0.0 * MAGNITUDE(self, place, route, progress)


def continuous(self, place, route, progress):
    """A spline without jumps: bilinear between the coefficients `c0` of a tile's cells,
    which sit on the grid's corners.
    """
    grid, tile = self.grid_size, route.tiles[:, 0]
    position = (place[:, 0] + 1) / 2 * (grid - 1)
    cell = jax.lax.stop_gradient(jnp.clip(jnp.floor(position), 0, grid - 2))
    (a, b), (i, j) = (position - cell).T, cell.astype(jnp.int32).T
    c0 = self._splines(progress, 2).reshape(self.num_tiles, grid, grid, 3)[..., 0]
    low = (1 - a) * c0[tile, i, j] + a * c0[tile, i + 1, j]
    high = (1 - a) * c0[tile, i, j + 1] + a * c0[tile, i + 1, j + 1]
    scale = self.param("spline_scale", nn.initializers.ones, (self.num_tiles,))
    return (scale[tile] * ((1 - b) * low + b * high))[:, None]


def flat_start(shape, rule, init, **rest):
    """Splines that start at zero everywhere: their latent coefficients are a tenth as
    large, below the threshold.
    """
    return kernel.TernaryKernel(shape, rule, lambda *args: 0.1 * init(*args), **rest)


def all_of_the_compressor(self, h, route, read, dtype):
    """The compressor's hidden units, for `linear_magnitude`."""
    del route, read
    width = compress_width(self.d_model, self.compress_hidden)
    return jax.nn.gelu(nn.Dense(width, name="compress_in", dtype=dtype)(h))[:, None]


def linear_magnitude(self, hidden, route, progress):
    """Not a spline of two numbers but each tile's own product with all hidden units."""
    del progress
    shape = self.num_tiles, hidden.shape[-1]
    init = nn.initializers.normal(shape[1] ** -0.5)
    magnitudes = self.param("magnitudes", init, shape)[route.tiles]
    return (hidden * magnitudes).sum(axis=-1)


def bits_without_splines(layer, config):
    return BITS(layer, dataclasses.replace(config, ternary_splines=False))


def bits_of_four_without_splines(layer, config):
    return sum(bits_without_splines(part, config) for part in layer.values())


def scaled_init(size: float) -> Callable:
    """Latent weights that start `size` times as large as the model has them start."""

    def make(shape, kernel_init, **rest):
        def init(*args):
            return size * kernel_init(*args)

        return kernel.TernaryKernel(shape, kernel_init=init, **rest)

    return make


def whole_layer(params):
    """Muon takes the tiles of a layer, `[N, D, F]` and `[N, F, D]`, for one matrix
    `[D, N F]` and `[N F, D]`, as a dense FFN has them.
    """
    numbers = optax.contrib.MuonDimensionNumbers
    up, down = numbers((1,), (0, 2)), numbers((0, 1), (2,))
    return jax.tree_util.tree_map_with_path(
        lambda path, _: up if is_up(path) else down, params
    )


def size_of_whole_layer(updates, _):
    """As `optimizer._to_adamw_size`, whose long side is a tile's."""

    def scaled(path, u):
        width = u.shape[1] if is_up(path) else u.shape[2]
        return u * (optimizer.MUON_RMS * max(width, u.size // width) ** 0.5)

    return jax.tree_util.tree_map_with_path(scaled, updates)


def is_up(path) -> bool:
    return path[-2].key == "up"


SIGNATURES, MATCH, GATES = routing.signatures, routing.match, routing.gates
ACTIVE, BITS = accounting._active, accounting._bits
MAGNITUDE = SparseLookupFFN._magnitude
SELECT, ROUTER_TOKENS = routing.select_tiles, tiles.router_tokens

CONTINUOUS = (SparseLookupFFN, "_magnitude", continuous)
LINEAR = (
    (SparseLookupFFN, "_place", all_of_the_compressor),
    (SparseLookupFFN, "_magnitude", linear_magnitude),
)
FOUR = (
    (block, "SparseLookupFFN", SideBySide),
    (accounting, "_active", active_side_by_side),
)

# name -> (owner, attribute, replacement), ...
PATCHES: dict[str, tuple[tuple[object, str, object], ...]] = {
    "ema": ((tiles, "Router", SlowRouter),),
    "no-gradient": ((routing, "signatures", without_gradient),),
    "raw": ((routing, "match", raw_scores),),
    "centred": ((routing, "match", centred_scores),),
    "principal": ((tiles.RoutedTiles, "_signature_sums", principal_direction),),
    "both": (
        (tiles, "TernaryKernel", RecordingKernel),
        (tiles.RoutedTiles, "_signature_sums", both_projections),
    ),
    "shared": (
        (routing, "select_tiles", with_tile_0),
        (routing, "gates", open_gate_0),
    ),
    "gated": ((tiles, "activation", lambda _: gated),),
    "norm": ((tiles, "activation", lambda _: normalised),),
    "init-double": ((tiles, "TernaryKernel", scaled_init(2.0)),),
    "init-half": ((tiles, "TernaryKernel", scaled_init(0.5)),),
    "whole": (
        (optimizer, "_each_matrix", whole_layer),
        (optimizer, "_to_adamw_size", size_of_whole_layer),
    ),
    "hash-gated": ((tiles, "Router", HashedWithGates),),
    "half-hashed": ((tiles, "Router", HalfHashed),),
    "token": ((tiles, "Router", TokenRouter),),
    "nothing": ((SparseLookupFFN, "_magnitude", no_magnitude),),
    "flat": ((sparse_lookup_ffn, "TernaryKernel", flat_start),),
    "continuous": (CONTINUOUS,),
    "linear": (*LINEAR, (accounting, "_bits", bits_without_splines)),
    "four": (*FOUR, (accounting, "_bits", bits_side_by_side)),
    "four-continuous": (*FOUR, CONTINUOUS, (accounting, "_bits", bits_side_by_side)),
    "four-linear": (
        *FOUR,
        *LINEAR,
        (accounting, "_bits", bits_of_four_without_splines),
    ),
    "pairs": ((tiles, "router_tokens", with_the_token_before(1.0)),),
    "pairs-half": ((tiles, "router_tokens", with_the_token_before(0.5)),),
}


def apply(name: str) -> None:
    """Puts a patch into the library for the rest of the process, which should have
    compiled nothing yet.

    Raises:
        ValueError: there is no such patch.
    """
    if name not in PATCHES:
        raise ValueError(
            f"patch must be one of {', '.join(sorted(PATCHES))}. Got {name!r}."
        )
    for owner, attribute, replacement in PATCHES[name]:
        setattr(owner, attribute, replacement)
