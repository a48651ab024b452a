"""Arrays inside `jax.shard_map`, which tells (`check_vma=True`, its default) those that
are the same on all devices from those that vary over a mapped axis.

A loop's carry must be of one kind from the start to the end, and so must be the
arguments of a function with a backward pass of its own: what is the same everywhere
and meets what varies is cast first. The cast's gradient is the sum over the axis, so that
weights get theirs of all devices, as from any other operation. Elsewhere nothing
happens.
"""

from typing import Any

import jax


def axes_of(tree: Any) -> frozenset:
    """The mapped axes that any leaf varies over."""
    found = (jax.typeof(leaf).mat.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*found)


def vary_like(tree: Any, other: Any) -> Any:
    """The same numbers, varying over all axes that `tree` or `other` vary over."""
    axes = axes_of((tree, other))

    def cast(leaf):
        missing = axes - jax.typeof(leaf).mat.varying
        return jax.lax.pcast(leaf, tuple(sorted(missing)), to="varying")

    return jax.tree.map(cast, tree) if axes else tree


def vary_alike(tree: Any) -> Any:
    """The same numbers, all varying over the axes that any of them varies over."""
    return vary_like(tree, ())
