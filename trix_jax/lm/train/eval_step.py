"""The evaluation step, on one device or on all those that the variables lie on.

Variables stay where they are. Where they lie on a mesh of several devices each takes an
equal share of a batch's rows, and computes what the train step computes there: slices
are gathered where the model needs them, and tokens travel to spread tiles
(`trix_jax.lm.train.sharding`). Logits are held in parts, as in training
(`trix_jax.lm.train.loss`). Sums over the devices add in another order than one
device does, so that losses agree up to that rounding; counts and tiles are the same.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from trix_jax.lm.train.loss import cross_entropy, head_weights
from trix_jax.lm.train.sharding import TILE_AXIS, Layout
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.typing import Array, Float, Integer


class EvalSums(NamedTuple):
    """One evaluation batch, to be added up.

    Attributes:
        loss: summed cross-entropy of the masked tokens.
        tokens: how many they are.
        counts: assignments a tile, `[layers, N]`; empty for a dense model.
        tiles: the tiles of every token, `[layers, tokens, K]`.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    counts: Float[Array, "layers N"]
    tiles: Integer[Array, "layers T K"]


class Placement(NamedTuple):
    """Where variables lie: on one device, or on a mesh of several.

    Attributes:
        everywhere: where an array lies that each of the devices has whole; None is the
            default device.
        mesh: of several devices; None: one device.
        treedef: of variables on a mesh.
        specs: how their leaves lie on it.
    """

    everywhere: Sharding | None
    mesh: Mesh | None = None
    treedef: Any = None
    specs: tuple[P, ...] = ()


def settle(variables: Any) -> tuple[Any, Placement]:
    """Variables as jax arrays, and where they lie.

    What lies on devices stays there. Arrays of the host go to the default device, or as
    a copy each to the devices of the others' mesh.

    Raises:
        ValueError: they lie on several meshes.
    """
    leaves, treedef = jax.tree.flatten(variables)
    meshes = {mesh for leaf in leaves if (mesh := _mesh_of(leaf))}
    if len(meshes) > 1:
        raise ValueError(f"variables must lie on one mesh of devices. Got {meshes}.")
    if not meshes:
        variables = jax.device_put(variables)
        committed = [x for x in jax.tree.leaves(variables) if x.committed]
        return variables, Placement(committed[0].sharding if committed else None)
    mesh = _automatic(next(iter(meshes)))
    leaves = [_on(mesh, x) for x in leaves]
    everywhere = NamedSharding(mesh, P())
    leaves = [x if _mesh_of(x) else jax.device_put(x, everywhere) for x in leaves]
    specs = tuple(leaf.sharding.spec for leaf in leaves)
    return treedef.unflatten(leaves), Placement(everywhere, mesh, treedef, specs)


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices and names, with axes that `shard_map` takes over (`jax.make_mesh`
    gives explicit ones).
    """
    return Mesh(mesh.devices, mesh.axis_names)


def _on(mesh: Mesh, leaf: Any) -> Any:
    """The array where it lies, on a mesh of the same devices."""
    if _mesh_of(leaf) is None:
        return leaf
    return jax.device_put(leaf, NamedSharding(mesh, leaf.sharding.spec))


def _mesh_of(leaf: Any) -> Mesh | None:
    """The mesh of several devices that an array lies on."""
    sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def put(placement: Placement, *rows: np.ndarray) -> list[Array]:
    """A host batch where the variables are, its rows over all devices; rows of zeros
    fill what these do not divide.
    """
    mesh = placement.mesh
    if mesh is None:
        return jax.device_put(list(rows), placement.everywhere)
    short = -len(rows[0]) % mesh.size
    filled = [np.pad(x, [(0, short), *[(0, 0)] * (x.ndim - 1)]) for x in rows]
    over, cut = NamedSharding(mesh, P(mesh.axis_names)), jax.make_array_from_callback
    return [cut(x.shape, over, x.__getitem__) for x in filled]


def make_eval_step(
    model: TransformerLM, layout: Layout | None = None
) -> Callable[[Any, Any, Any, Any], EvalSums]:
    """Builds `(variables, tokens [B, L + 1], mask [B, L], progress) -> EvalSums` for
    one device.

    With `layout`, of the variables as a whole, these are this device's parts, and all
    sums but `tiles` are those of all devices.
    """
    spread = layout is not None and TILE_AXIS in _names(layout.specs)
    model = model.clone(tile_axis=TILE_AXIS if spread else None)

    def step(variables, tokens, mask, progress) -> EvalSums:
        variables = layout.gathered(variables) if layout else variables
        outputs: Any = model.apply(
            variables, tokens[:, :-1], progress=progress, hidden=True
        )
        hidden, infos, _ = outputs
        head = head_weights(variables["params"], model.config)
        loss = cross_entropy(hidden, head, tokens[:, 1:])
        counts, tiles = _routes(infos, mask)
        sums = jnp.sum(loss * mask), mask.sum(), counts
        sums = jax.lax.psum(sums, layout.axes) if layout else sums
        loss, tokens_seen, counts = sums
        return EvalSums(loss, tokens_seen, counts, tiles)

    return step


def _routes(infos, mask) -> tuple[Array, Array]:
    """Assignments a tile and the tiles of every token, of each layer that has them."""
    routed = [info for info in infos if info is not None]
    if not routed:
        return jnp.zeros((0, 0)), jnp.zeros((0, mask.size, 1), jnp.uint16)
    tiles = jnp.stack([info.tiles.reshape(mask.size, -1) for info in routed])
    seen = mask.reshape(1, -1, 1) * jnp.ones(tiles.shape)
    n = routed[0].counts.shape[0]
    counts = jax.vmap(
        lambda t, w: jnp.bincount(t.reshape(-1), w.reshape(-1), length=n)
    )(tiles, seen)
    return counts, tiles.astype(jnp.uint16)


def _names(specs: tuple[P, ...]) -> set:
    return {names for spec in specs for names in spec}


@lru_cache(maxsize=8)
def compiled(config: TransformerConfig, placement: Placement) -> Callable:
    """`make_eval_step`, compiled for variables that lie so."""
    model, mesh = TransformerLM(config), placement.mesh
    if mesh is None:
        return jax.jit(make_eval_step(model))
    rows, layout = P(mesh.axis_names), Layout(mesh.axis_names, placement.specs)
    sums: Any = P(), P(), P(), P(None, mesh.axis_names)
    step = jax.shard_map(
        make_eval_step(model, layout),
        mesh=mesh,
        in_specs=(placement.treedef.unflatten(placement.specs), rows, rows, P()),
        out_specs=EvalSums(*sums),
        check_vma=False,
    )
    return jax.jit(step)
