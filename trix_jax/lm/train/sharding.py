"""Parameters and optimizer state spread over the devices, each holding its part: for
models that do not fit on one.

The weights of tiles may be cut by tile (`trix_jax.expert_parallel`): a device computes
with its own and never sees the others'. What remains may be sliced: a leaf is cut along
its longest axis that the number of devices divides. A step gathers slices where the
model needs them, gradients come back summed and cut, and each device updates its own
part (Rajbhandari et al., 2020, "ZeRO", https://arxiv.org/abs/1910.02054). The routing
state is a copy on every device.
"""

import math
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from trix_jax import expert_parallel
from trix_jax.expert_parallel import axes_of
from trix_jax.typing import Array, Float

TILE_AXIS = "tile"


class Layout(NamedTuple):
    """How a step sees parameters and gradients of which it has this device's parts.

    Attributes:
        axes: the mesh axes that tokens are spread over: all.
        specs: how each parameter lies on them, in the order of the tree's leaves.
    """

    axes: tuple[str, ...]
    specs: tuple[P, ...]

    @property
    def tile_axis(self) -> str | None:
        """The axis that tiles are spread over."""
        return TILE_AXIS if TILE_AXIS in self.axes else None

    @property
    def is_sliced(self) -> bool:
        """Whether parameters other than those of tiles are in parts."""
        return any(set(axes_of(spec)) - {TILE_AXIS} for spec in self.specs)

    def gathered(self, params: Any) -> Any:
        """Whole parameters but for those of tiles elsewhere."""
        leaves, treedef = jax.tree.flatten(params)
        pairs = zip(leaves, self.specs, strict=True)
        return treedef.unflatten([_gathered(leaf, spec) for leaf, spec in pairs])

    def mean(self, grads: Any) -> Any:
        """Gradients of the mean loss, cut as the parameters are."""
        return expert_parallel.mean_gradients(grads, self._tree(grads), self.axes)

    def norm(self, grads: Any) -> Float[Array, ""]:
        """The norm of all gradients, wherever they are."""
        return expert_parallel.global_norm(grads, self._tree(grads))

    def _tree(self, like: Any) -> Any:
        return jax.tree.structure(like).unflatten(self.specs)


def _gathered(x: Array, spec: P) -> Array:
    for axis, names in enumerate(spec):
        if names not in (None, TILE_AXIS):
            x = jax.lax.all_gather(x, names, axis=axis, tiled=True)
    return x


def layout_of(params: Any, sizes: dict[str, int], is_sliced: bool) -> Layout:
    """The layout of parameters, given whole, over mesh axes of these sizes."""
    specs = specs_of(params, sizes, is_sliced)
    return Layout(tuple(sizes), tuple(jax.tree.leaves(specs)))


def specs_of(tree: Any, sizes: dict[str, int], is_sliced: bool) -> Any:
    """How a tree of whole arrays lies on mesh axes of these sizes: moments are cut as
    their parameters, having their names and shapes.
    """
    if TILE_AXIS in sizes:
        specs = expert_parallel.specs(tree, TILE_AXIS)
    else:
        specs = jax.tree.map(lambda _: P(), tree)
    if not is_sliced:
        return specs
    return jax.tree.map(
        lambda leaf, spec: _sliced(leaf.shape, spec, sizes), tree, specs
    )


def _sliced(shape: tuple[int, ...], spec: P, sizes: dict[str, int]) -> P:
    """Cuts along one more axis of the array, over the mesh axes that are left."""
    rest = tuple(name for name in sizes if name not in axes_of(spec))
    shape = (0,) * len(spec) + shape[len(spec) :]
    cut = cut_of(shape, math.prod(sizes[name] for name in rest))
    if cut is None or not rest:
        return spec
    return P(*spec, *[None] * (cut - len(spec)), rest)


def cut_of(shape: tuple[int, ...], count: int) -> int | None:
    """The axis along which an array of this shape is cut in `count`, None if it is not."""
    fitting = [axis for axis, size in enumerate(shape) if size and size % count == 0]
    return max(fitting, key=lambda axis: shape[axis], default=None)
