"""Parameters and optimizer state spread over the devices, each holding a slice: for
models that do not fit on one.

A leaf is cut along its longest axis that the number of devices divides; the others, and
the routing state, are copies. A step gathers the parameters, averages the gradients,
and each device updates its own slice (Rajbhandari et al., 2020, "ZeRO",
https://arxiv.org/abs/1910.02054): at rest a device holds 1/n of parameters and moments,
and within a step the whole parameters and gradients too.
"""

from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from trix_jax.typing import Array


def cut_of(shape: tuple[int, ...], count: int) -> int | None:
    """The axis along which an array of this shape is cut in `count`, None if it is not."""
    fitting = [axis for axis, size in enumerate(shape) if size and size % count == 0]
    return max(fitting, key=lambda axis: shape[axis], default=None)


class Slices(NamedTuple):
    """How a step sees slices: of `axis_name` of `count` devices.

    Attributes:
        cuts: the axis of each parameter, in the order of the tree's leaves; -1 for a
            copy.
    """

    axis_name: str
    count: int
    cuts: tuple[int, ...]

    def whole(self, slices: Any) -> Any:
        """Parameters from everybody's slices."""

        def gather(x: Array, cut: int) -> Array:
            if cut < 0:
                return x
            return jax.lax.all_gather(x, self.axis_name, axis=cut, tiled=True)

        return self._map(gather, slices)

    def own(self, whole: Any) -> Any:
        """This device's slices of what all have."""

        def cut_out(x: Array, cut: int) -> Array:
            if cut < 0:
                return x
            size = x.shape[cut] // self.count
            start = jax.lax.axis_index(self.axis_name) * size
            return jax.lax.dynamic_slice_in_dim(x, start, size, cut)

        return self._map(cut_out, whole)

    def _map(self, function, tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        pairs = zip(leaves, self.cuts, strict=True)
        return treedef.unflatten([function(leaf, cut) for leaf, cut in pairs])


def slices_of(params: Any, axis_name: str, count: int) -> Slices:
    """The slices of parameters, given whole, over an axis."""
    cuts = (cut_of(leaf.shape, count) for leaf in jax.tree.leaves(params))
    return Slices(axis_name, count, tuple(-1 if c is None else c for c in cuts))


def specs_of(tree: Any, axis_name: str, count: int) -> Any:
    """How a tree of whole arrays lies on a mesh: moments are cut as their parameters,
    having their shapes.
    """

    def spec(leaf) -> P:
        cut = cut_of(leaf.shape, count)
        return P() if cut is None else P(*[None] * cut, axis_name)

    return jax.tree.map(spec, tree)
