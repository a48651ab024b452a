"""What every parameter is, for optimizers: whom weight decay shrinks, who gets a
learning rate or an optimizer of its own.
"""

from typing import Any

import jax

PROJECTIONS = ("up", "down", "kernel")  # the modules of latent ternary matrices
BOX = jax.tree_util.GetAttrKey("value")  # of `nn.Partitioned`, `nnx.Param`
OWN = ("tile_read", "tile_write")  # those of tiles that read by themselves


def optimizer_labels(params: Any) -> Any:
    """A tree like `params` with a word for every parameter.

    ===========  ===============================================================
    "ternary"    latent matrices of tiles, of `TriXLinear` and of lookups that read
                 by themselves: decayed, or given to Muon matrix by matrix,
                 `[..., I, O]`
    "kernel"     real matrices (attention, heads, dense layers): decayed
    "other"      embeddings, norms, biases, scales, directions, and the latent
                 splines, whose threshold is fixed: not decayed
    ===========  ===============================================================

    Leaves are known by the names that Flax gives them: a matrix of your own that is not
    called `kernel` is "other".

    Goes into `optax.partition(transforms, optimizer_labels)`; boxes stay around the
    words. A mask for decay is
    `jax.tree.map(lambda label: label != "other", optimizer_labels(params))`.
    """

    def label(path, _):
        inside = [entry for entry in path if entry != BOX]
        names = [str(getattr(e, "key", getattr(e, "name", ""))) for e in inside]
        names = names or [""]  # a parameter by itself
        if names[-1] == "router":
            return "kernel"
        if names[-1] != "kernel" or names[-2:-1] == ["splines"]:
            return "other"
        in_tiles = "tiles" in names[:-2] and names[-2] in PROJECTIONS
        is_own = names[-2:-1] in ([name] for name in (*OWN, "kernel"))
        return "ternary" if in_tiles or is_own else "kernel"

    return jax.tree_util.tree_map_with_path(label, params)
