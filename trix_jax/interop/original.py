"""The PyTorch TriX layers, formula by formula: what an imported checkpoint computes.

The original differs from this library's layers in its thresholds, its signatures (signs
of float sums, averaged over training), its norms' epsilons, its exact GELU, its inner
residual and its float32 scales. These functions follow it in all of them, on arrays
that keep its names, and compute the tiles by this library's dispatch.
`trix_jax.interop.adopt` turns the same arrays into this library's layers, to train on.

    q(w) = sign(w) * (|w| > 0.5)

References:
    TriX, https://github.com/anjaustin/trix.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from trix_jax.nn.router import Route
from trix_jax.nn.tiles import tile_ffn
from trix_jax.ternary import Ternary, TernaryConfig, ternarize
from trix_jax.typing import Array, Float, Integer

Arrays = Mapping[str, Array]
Settings = Mapping[str, int]
Tiles = Integer[Array, "T"]

RMS_EPSILON = float(jnp.finfo(jnp.float32).eps)  # torch.nn.RMSNorm's default
LAYER_EPSILON = 1e-5  # torch.nn.LayerNorm's default
SPLINE_THRESHOLD = 0.3


def q(w: Float[Array, "..."], threshold: float = 0.5) -> Float[Array, "..."]:
    """The original's ternary weights, with its straight-through gradient."""
    rule = TernaryConfig(rule="fixed", threshold=threshold)
    return ternarize(w.reshape(-1, w.shape[-1]), rule).q.reshape(w.shape)


def linear(
    a: Arrays,
    x: Float[Array, "T I"],
    settings: Settings,
    gate: Float[Array, "T N"] | None = None,
) -> Float[Array, "T O"]:
    """Computes `(x @ q(weight).T) * scales * gate + bias`, the gate a value a tile of
    outputs.
    """
    y = (x @ q(a["weight"]).T) * a["scales"][None]
    if gate is not None:
        y *= jnp.repeat(gate, y.shape[-1] // settings["num_tiles"], axis=-1)
    return y + a["bias"][None] if "bias" in a else y


def row_signatures(weight: Float[Array, "O I"], num_tiles: int) -> Float[Array, "N I"]:
    """Signatures of TriXLinear's tiles, `sign(sum of the tile's rows)`."""
    return jnp.sign(weight.reshape(num_tiles, -1, weight.shape[-1]).sum(axis=1))


def sparse_ffn(
    a: Arrays, x: Float[Array, "T D"], settings: Settings
) -> tuple[Float[Array, "T D"], Tiles]:
    """Computes `(relu((x @ q(up_t).T) * s_up) @ q(down_t).T) * s_down`, `t = argmax x .
    signature`.
    """
    n, d = settings["num_tiles"], x.shape[-1]
    up, down = a["up_proj.weight"], a["down_proj.weight"]
    signature = a.get("up_proj.cached_signatures", row_signatures(up, n))
    tile = jnp.argmax(x @ signature.T, axis=-1)
    up_NDF = q(up).reshape(n, -1, d).swapaxes(-1, -2)
    down_NFD = q(down).T.reshape(n, -1, d)
    up_scale = a["up_proj.scales"].reshape(n, 1, -1)
    down_scale = jnp.broadcast_to(a["down_proj.scales"], (n, 1, d))
    weights = Ternary(up_NDF, up_scale), Ternary(down_NFD, down_scale)
    return _tiles(x, tile, jnp.ones(n), *weights), tile


def hierarchical_ffn(
    a: Arrays, x: Float[Array, "T D"], settings: Settings
) -> tuple[Float[Array, "T D"], Tiles]:
    """Computes `x + output_scale_t * (relu((h @ q(up_t).T) * s_up_t) @ q(down_t).T) *
    s_down_t`.

    `h = RMSNorm(x)`; the tile t has the best signature in the token's best clusters.
    """
    h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + RMS_EPSILON)
    h *= a["input_norm.weight"][None]
    signature = a.get("ema_tile_signatures", tile_signatures(a["tiles.up_weight"]))
    near = jax.lax.top_k(
        h @ a["cluster_signatures"].T, settings.get("top_k_clusters", 1)
    )[1]
    tile = _best_tile(h @ signature.T, a["cluster_assignments"], near)
    up, down = (
        Ternary(
            q(a[f"tiles.{name}_weight"]).swapaxes(-1, -2),
            a[f"tiles.{name}_scale"][:, None],
        )
        for name in ("up", "down")
    )
    return x + _tiles(h, tile, a["tiles.output_scale"][:, 0], up, down), tile


def tile_signatures(up: Float[Array, "N F D"]) -> Float[Array, "N D"]:
    """Signatures of the hierarchical layer's tiles, `sign(sum over rows of sign(up))`."""
    return jnp.sign(jnp.sign(up).sum(axis=1))


def lookup_ffn(
    a: Arrays, x: Float[Array, "T D"], settings: Settings
) -> tuple[Float[Array, "T D"], Tiles]:
    """Computes `x + output_scale * m_t(a, b) * direction_t` with `(a, b) = tanh(W2
    gelu(W1 h))`.
    """
    h = layer_norm(a, "norm", x)
    signature, home = jnp.sign(a["directions"]), a["cluster_assignments"]
    clusters = settings["num_clusters"]
    member = (home[None] == jnp.arange(clusters)[:, None]).astype(x.dtype)
    mean = member @ signature / member.sum(axis=1, keepdims=True)
    near = jnp.argmax(h @ jnp.sign(mean).T, axis=-1)[:, None]
    tile = _best_tile(h @ signature.T, home, near)
    hidden = jax.nn.gelu(dense(a, "compress.0", h), approximate=False)
    ab = jnp.tanh(dense(a, "compress.2", hidden))
    magnitude = _spline(a, ab, tile)
    y = magnitude[:, None] * a["directions"][tile] * a["output_scale"][0]
    return x + y, tile


def block(
    a: Arrays, x: Float[Array, "B L D"], settings: Settings, ffn: Callable
) -> tuple[Float[Array, "B L D"], Integer[Array, "B L"]]:
    """Attention and FFN as the original's blocks have them.

    `x += attention(norm1(x))`, then `x += ffn(norm2(x))`; with `lookup_ffn`, which has
    its own norm and residual, `x = ffn(x)`.
    """
    is_lookup = "ln1.weight" in a
    norm, attention = ("ln1", "attn") if is_lookup else ("norm1", "attention")
    x = x + _attention(a, attention, layer_norm(a, norm, x), settings["n_heads"])
    h = x if is_lookup else layer_norm(a, "norm2", x)
    y, tile = ffn(inner(a, "ffn"), h.reshape(-1, h.shape[-1]), settings)
    y = y.reshape(x.shape)
    return (y if is_lookup else x + y), tile.reshape(x.shape[:-1])


def language_model(
    a: Arrays, tokens: Integer[Array, "B L"], settings: Settings, ffn: Callable
) -> tuple[Float[Array, "B L V"], list[Integer[Array, "B L"]]]:
    """Next-token logits and the tiles of every block."""
    x = a["token_emb.weight"][tokens] + a["pos_emb.weight"][None, : tokens.shape[1]]
    tiles = []
    for i in range(settings["n_layers"]):
        x, tile = block(inner(a, f"blocks.{i}"), x, settings, ffn)
        tiles.append(tile)
    return layer_norm(a, "ln_f", x) @ a["lm_head.weight"].T, tiles


def inner(a: Arrays, name: str) -> dict[str, Array]:
    """The arrays of a submodule, without its name."""
    return {
        key.removeprefix(f"{name}."): value
        for key, value in a.items()
        if key.startswith(f"{name}.")
    }


def dense(a: Arrays, name: str, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """Computes `x @ weight.T + bias`."""
    y = x @ a[f"{name}.weight"].T
    return y + a[f"{name}.bias"].reshape(*[1] * (y.ndim - 1), -1)


def layer_norm(a: Arrays, name: str, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Computes `(x - mean) / sqrt(variance + 1e-5) * weight + bias`."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    shape = (*[1] * (x.ndim - 1), -1)
    weight, bias = (a[f"{name}.{part}"].reshape(shape) for part in ("weight", "bias"))
    return centred * jax.lax.rsqrt(variance + LAYER_EPSILON) * weight + bias


def _attention(a, name, x, n_heads):
    qkv = x @ a[f"{name}.in_proj_weight"].T + a[f"{name}.in_proj_bias"][None, None]
    heads = jnp.moveaxis(qkv.reshape(*x.shape[:-1], 3, n_heads, -1), -3, 0)
    y = jax.nn.dot_product_attention(*heads, is_causal=True)
    return dense(a, f"{name}.out_proj", y.reshape(x.shape))


def _tiles(h, tile, gate, up, down):
    shape = (up.q.shape[0], up.q.shape[-1])
    return tile_ffn(
        h, Route(tile[:, None], gate[tile][:, None]), up, down, shape, jax.nn.relu
    )


def _best_tile(scores, home, near):
    """The best tile in a token's clusters; of equal scores the better cluster, then the
    lower index.
    """
    best = jnp.full(scores.shape[0], -jnp.inf)
    tile = jnp.zeros(scores.shape[0], jnp.int32)
    for cluster in near.T:
        here = jnp.where(home[None] == cluster[:, None], scores, -jnp.inf)
        better = here.max(axis=-1) > best
        tile = jnp.where(better, jnp.argmax(here, axis=-1), tile)
        best = jnp.where(better, here.max(axis=-1), best)
    return tile


def _spline(a, ab, tile):
    """Computes `s_t * (c0 + c1 * la + c2 * lb)` in the cell that (a, b) falls into."""
    grid = a["splines.coeffs"].shape[1]
    cell = jnp.clip(((ab + 1) / 2 * grid).astype(jnp.int32), 0, grid - 1)
    local = ((ab + 1) - cell * (2 / grid)) / (2 / grid)
    is_ternary = "splines.scale" in a
    c = a["splines.coeffs"]
    c = q(c, SPLINE_THRESHOLD) if is_ternary else c
    c0, c1, c2 = c[tile, cell[:, 0], cell[:, 1]].T
    value = c0 + c1 * local[:, 0] + c2 * local[:, 1]
    return value * a["splines.scale"][tile, 0] if is_ternary else value
