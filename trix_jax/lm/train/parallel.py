"""One device, several, or several processes: the same per-device step under `jax.jit`,
`jax.pmap` or `jax.shard_map`.

The batch is split along its second axis, `[accumulate, B, L + 1]`. Parameters are
replicated, or with `Spread` each device has its part (`trix_jax.lm.train.sharding`).
`jax.pmap` maps over the devices of one process, `jax.shard_map` over those of one or
many; a test holds them to the same numbers.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import flax.jax_utils
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trix_jax import routing
from trix_jax.lm.train.sharding import TILE_AXIS, layout_of, specs_of
from trix_jax.lm.train.step import AXIS, TrainState
from trix_jax.nn.transformer import TransformerConfig


class Spread(NamedTuple):
    """`jax.shard_map` over parts of the state.

    Attributes:
        tiles: devices that the tiles of a layer are spread over; 1 keeps them together.
        is_sliced: whether what is not cut by tile is sliced.
    """

    tiles: int = 1
    is_sliced: bool = False


Mapping = Literal["jit", "pmap", "shard_map"] | Spread
Devices = Sequence[jax.Device]


def mapping_over(devices: Devices, is_sliced: bool = False, tiles: int = 1) -> Mapping:
    """How a step is mapped over devices if no mapping is given."""
    if len(devices) > 1 and (is_sliced or tiles > 1):
        return Spread(tiles, is_sliced)
    if any(device.process_index != jax.process_index() for device in devices):
        return "shard_map"
    return "jit" if len(devices) == 1 else "pmap"


def compile_step(
    make_step: Callable[..., Callable],
    devices: Devices,
    mapping: Mapping | None = None,
) -> Callable:
    """Compiles `make_step(axis_name)`, or `make_step(axis_name, layout)` if spread, a
    `(state, batch) -> (state, metrics)`; the state's buffers are reused.

    Returns a function that takes a placed state (see `place`) and a host batch
    `[accumulate, B, L + 1]`, under `shard_map` the same global batch in every process.
    """
    match mapping or mapping_over(devices):
        case "jit":
            return jax.jit(make_step(None), donate_argnums=0)
        case "pmap":
            return _pmapped(make_step, devices)
        case kind:
            return _shard_mapped(make_step, devices, kind)


def _pmapped(make_step: Callable[..., Callable], devices: Devices) -> Callable:
    mapped = jax.pmap(
        make_step(AXIS), axis_name=AXIS, devices=devices, donate_argnums=0
    )
    count = len(devices)

    def step(state, batch):
        accumulate, size, length = batch.shape
        split = np.swapaxes(
            batch.reshape(accumulate, count, size // count, length), 0, 1
        )
        state, metrics = mapped(state, split)
        return state, jax.tree.map(lambda x: x[0], metrics)

    return step


def _shard_mapped(
    make_step: Callable[..., Callable], devices: Devices, mapping: Mapping
) -> Callable:
    mesh = _mesh(devices, mapping)
    mapped = shard_mapped(make_step, mesh, mapping)
    split = NamedSharding(mesh, rows_over(mesh))

    def step(state, batch):
        cut = jax.make_array_from_callback(batch.shape, split, lambda at: batch[at])
        return mapped(state, cut)

    return step


def shard_mapped(
    make_step: Callable[..., Callable], mesh: Mesh, mapping: Mapping
) -> jax.stages.Wrapped:
    """`jit(shard_map(step))` over a mesh, a function of a state and a batch that lie as
    `state_specs` and `rows_over` say.
    """

    @partial(jax.jit, donate_argnums=0)
    def mapped(state, batch):
        if isinstance(mapping, Spread):
            layout = layout_of(state.params, dict(mesh.shape), mapping.is_sliced)
            step = make_step(layout.axes, layout)
        else:
            step = make_step(AXIS)
        specs = state_specs(state, mesh, mapping)
        # With the check on, gradients of replicated arguments arrive summed over the
        # axis already.
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, rows_over(mesh)),
            out_specs=(specs, P()),
            check_vma=False,
        )(state, batch)

    return mapped


def rows_over(mesh: Mesh) -> P:
    """How a batch lies on the mesh: its rows over all axes."""
    return P(None, mesh.axis_names)


def check_batch(batch_size: int, accumulate: int, devices: Devices) -> None:
    """Raises a ValueError unless the micro-batches split evenly over the devices."""
    if batch_size % (accumulate * len(devices)):
        raise ValueError(
            f"train.batch_size={batch_size} must be a multiple of accumulate={accumulate} times {len(devices)} devices."
        )


def check_spread(model: TransformerConfig, tiles: int, devices: Devices) -> None:
    """Raises a ValueError unless a model's tiles spread evenly over `tiles` devices."""
    if tiles == 1:
        return
    if tiles < 1 or len(devices) % tiles:
        raise ValueError(
            f"shard_tiles={tiles} must be at least 1 and divide the {len(devices)} devices."
        )
    if model.ffn not in ("sparse", "hierarchical"):
        raise ValueError(
            f"shard_tiles={tiles} needs tiles with weights: model.ffn 'sparse' or "
            f"'hierarchical'. Got {model.ffn!r}."
        )
    if model.num_tiles % tiles:
        raise ValueError(
            f"shard_tiles={tiles} must divide model.num_tiles={model.num_tiles}."
        )


def place(state: Any, devices: Devices, mapping: Mapping | None = None) -> Any:
    """Puts a state on the devices: as it is on one, a copy each on several."""
    kind = mapping or mapping_over(devices)
    if not isinstance(kind, Spread):
        return _place_whole(state, devices, kind)
    state, mesh = jax.device_get(state), _mesh(devices, kind)
    specs = state_specs(state, mesh, kind)
    return jax.tree.map(partial(_put, mesh), state, specs)


def fetch(state: Any, devices: Devices, mapping: Mapping | None = None) -> Any:
    """The state as one copy on the host."""
    match mapping or mapping_over(devices):
        case "jit":
            return jax.device_get(state)
        case "pmap":
            return jax.device_get(flax.jax_utils.unreplicate(state))
        case "shard_map":
            return jax.device_get(jax.tree.map(lambda x: x.addressable_data(0), state))
        case Spread():
            return jax.tree.map(_whole, state)


def to_save(state: Any, devices: Devices, mapping: Mapping | None = None) -> Any:
    """The state for a checkpoint: as it lies where the devices have parts of it, one
    device's copy where each has a whole one.
    """
    kind = mapping or mapping_over(devices)
    return state if isinstance(kind, Spread) else fetch(state, devices, kind)


def variables_of(
    state: TrainState, devices: Devices, mapping: Mapping | None = None
) -> dict[str, Any]:
    """Parameters and routing state as they lie on the devices, for an evaluation there."""
    found = {"params": state.params, "routing": state.routing}
    found = {name: tree for name, tree in found.items() if tree}
    if (mapping or mapping_over(devices)) == "pmap":
        return _unstacked(tuple(devices))(found)
    return found


@lru_cache(maxsize=4)
def _unstacked(devices: tuple[jax.Device, ...]) -> Callable:
    """What `jax.pmap` has stacked, a copy a device, as an array that each has whole; no
    device asks another.
    """
    mesh = _mesh(devices, "pmap")
    own = jax.shard_map(
        partial(jax.tree.map, lambda x: x[0]),
        mesh=mesh,
        in_specs=P(AXIS),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(own)


def rebuild_clusters(
    state: TrainState, devices: Devices, mapping: Mapping | None = None
) -> TrainState:
    """`routing.rebuild_clusters` of a placed state. Only the routing state moves, which
    every device has whole; without clusters nothing does.
    """
    paths = jax.tree_util.tree_leaves_with_path(state.routing)
    if not any(path[-1] == jax.tree_util.DictKey("members") for path, _ in paths):
        return state
    whole = routing.rebuild_clusters(fetch(state.routing, devices, mapping))
    return state._replace(routing=_place_whole(whole, devices, mapping))


def _place_whole(tree: Any, devices: Devices, mapping: Mapping | None) -> Any:
    """Puts a tree on the devices, a copy each."""
    match mapping or mapping_over(devices):
        case "jit":
            return jax.device_put(tree, devices[0])
        case "pmap":
            return flax.jax_utils.replicate(tree, list(devices))
        case kind:
            put = partial(_put, _mesh(devices, kind), spec=P())
            return jax.tree.map(put, jax.device_get(tree))


def _mesh(devices: Devices, mapping: Mapping) -> Mesh:
    sizes = axis_sizes(len(devices), mapping)
    grid = np.asarray(devices).reshape(*sizes.values())
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def axis_sizes(devices: int, mapping: Mapping) -> dict[str, int]:
    """The mesh: ("data", "tile") where tiles are spread, else ("data",)."""
    tiles = mapping.tiles if isinstance(mapping, Spread) else 1
    return {AXIS: devices // tiles} | ({TILE_AXIS: tiles} if tiles > 1 else {})


def state_specs(state: TrainState, mesh: Mesh, mapping: Mapping) -> TrainState:
    """How a state lies on the mesh."""
    specs = jax.tree.map(lambda _: P(), state)
    if not isinstance(mapping, Spread):
        return specs
    how = dict(mesh.shape), mapping.is_sliced
    return specs._replace(
        params=specs_of(state.params, *how), opt_state=specs_of(state.opt_state, *how)
    )


def _put(mesh: Mesh, leaf: Any, spec: P) -> jax.Array:
    leaf, sharding = np.asarray(leaf), NamedSharding(mesh, spec)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda at: leaf[at])


def _whole(leaf: jax.Array) -> np.ndarray:
    """An array of which this process may hold a part only; all processes ask together."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
