"""Imported PyTorch layers as this library's layers, to train on.

The weights, scales, signatures and clusters carry over, routes are held (`frozen`)
until `routing.freeze_routing(state, False)` lets them go. What then differs from the
original: scales are rounded to bfloat16 (relative 2^-9), norms have Flax's epsilon
1e-6, the lookup layer's GELU is the tanh form, and a cluster's signature is read off
its tiles of today.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.balance import BINS
from trix_jax.interop import original
from trix_jax.interop.from_torch import Imported
from trix_jax.nn.hierarchical_ffn import HierarchicalTriXFFN
from trix_jax.nn.linear import TriXLinear
from trix_jax.nn.sparse_ffn import SparseTriXFFN
from trix_jax.nn.sparse_lookup_ffn import SparseLookupFFN
from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig

TERNARY = TernaryConfig(rule="fixed")
ROUTING = RoutingConfig(signature="sign", gate="none")


def adopt(imported: Imported) -> tuple[nn.Module, dict[str, Any]]:
    """The layer and its variables.

    Raises:
        ValueError: a language model, whose blocks have another shape than
            `TransformerLM`'s; take its FFNs out with `original.inner(arrays,
            "blocks.0.ffn")`.
    """
    adopters = {
        "linear": _linear,
        "sparse": _sparse,
        "hierarchical": _hierarchical,
        "lookup": _lookup,
    }
    if imported.kind not in adopters:
        raise ValueError(
            f"kind must be one of {', '.join(adopters)}. Got {imported.kind!r}."
        )
    return adopters[imported.kind](imported.arrays, imported.settings)


def _linear(a, settings):
    features, width = a["weight"].shape
    n = settings["num_tiles"]
    layer = TriXLinear(features, n, use_bias="bias" in a, ternary=TERNARY)
    kernel = a["weight"].reshape(n, -1, width).swapaxes(-1, -2)
    kernel = {"kernel": kernel, "scale": a["scales"].reshape(n, 1, -1)}
    bias = {"bias": a["bias"]} if "bias" in a else {}
    return layer, {"params": {"kernel": kernel, **bias}}


def _sparse(a, settings):
    n, (hidden, d) = settings["num_tiles"], a["up_proj.weight"].shape
    if hidden % d:
        raise ValueError(
            f"the hidden width must be a multiple of d_model={d} to be adopted. Got {hidden}."
        )
    layer = SparseTriXFFN(
        d,
        num_tiles=n,
        expansion=hidden // d,
        activation="relu",
        ternary=TERNARY,
        routing=ROUTING,
    )
    up = {
        "kernel": a["up_proj.weight"].reshape(n, -1, d).swapaxes(-1, -2),
        "scale": a["up_proj.scales"].reshape(n, 1, -1),
    }
    down = {
        "kernel": a["down_proj.weight"].T.reshape(n, -1, d),
        "scale": jnp.broadcast_to(a["down_proj.scales"], (n, 1, d)),
    }
    signature = original.row_signatures(a["up_proj.weight"], n)
    router = _router(a.get("up_proj.cached_signatures", signature))
    return layer, {
        "params": {"tiles": {"up": up, "down": down}},
        "routing": {"tiles": {"router": router}},
    }


def _hierarchical(a, settings):
    n, width, d = a["tiles.up_weight"].shape
    members = _members(a["cluster_assignments"])
    layer = HierarchicalTriXFFN(
        d,
        d_hidden=width,
        num_tiles=n,
        tiles_per_cluster=members.shape[1],
        top_k_clusters=settings["top_k_clusters"],
        residual=True,
        activation="relu",
        ternary=TERNARY,
        routing=ROUTING,
    )
    kernels = {
        name: {
            "kernel": a[f"tiles.{name}_weight"].swapaxes(-1, -2),
            "scale": a[f"tiles.{name}_scale"][:, None],
        }
        for name in ("up", "down")
    }
    kernels["down"]["scale"] *= a["tiles.output_scale"][:, :, None]
    signature = original.tile_signatures(a["tiles.up_weight"])
    router = _router(a.get("ema_tile_signatures", signature), members)
    params = {
        "tiles": kernels,
        "norm": {"scale": a["input_norm.weight"]},
        "output_scale": jnp.ones(()),
    }
    return layer, {"params": params, "routing": {"tiles": {"router": router}}}


def _lookup(a, settings):
    (n, d), grid = a["directions"].shape, a["splines.coeffs"].shape[1]
    members = _members(a["cluster_assignments"])
    is_ternary = "splines.scale" in a
    layer = SparseLookupFFN(
        d,
        num_tiles=n,
        tiles_per_cluster=members.shape[1],
        grid_size=grid,
        compress_hidden=a["compress.0.bias"].shape[0],
        ternary_splines=is_ternary,
        residual=True,
        routing=ROUTING,
    )
    splines = a["splines.coeffs"].reshape(n, -1)
    params = {
        "norm": {"scale": a["norm.weight"], "bias": a["norm.bias"]},
        "compress_in": _dense(a, "compress.0"),
        "compress_out": _dense(a, "compress.2"),
        "directions": a["directions"],
        "splines": {"kernel": splines} if is_ternary else splines,
        "spline_scale": a["splines.scale"][:, 0] if is_ternary else jnp.ones(n),
        "output_scale": a["output_scale"][0],
    }
    state = _router(jnp.sign(a["directions"]), members)
    return layer, {"params": params, "routing": {"router": state}}


def _dense(a, name):
    return {"kernel": a[f"{name}.weight"].T, "bias": a[f"{name}.bias"]}


def _members(home):
    """Tiles of each cluster, ascending.

    Raises:
        ValueError: clusters of different sizes.
    """
    sizes = jnp.bincount(home)
    if (sizes != sizes[0]).any():
        raise ValueError(f"clusters must be of one size. Got {sizes.tolist()}.")
    return jnp.argsort(home, stable=True).astype(jnp.int32).reshape(len(sizes), -1)


def _router(signature, members=None):
    """The routing state of a layer that holds these signatures."""
    n = len(signature)
    state = {
        "bias": jnp.zeros(n),
        "margins": jnp.zeros((n, BINS)),
        "signature": signature,
        "frozen": jnp.ones((), bool),
    }
    if members is None:
        return state
    c = len(members)
    clusters = {"cluster_bias": jnp.zeros(c), "cluster_margins": jnp.zeros((c, BINS))}
    return {**state, "members": members, **clusters}
