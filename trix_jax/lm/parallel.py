"""One device, several, or several processes: the same per-device step under `jax.jit`,
`jax.pmap` or `jax.shard_map`.

The batch is split along its second axis, `[accumulate, B, L + 1]`. Parameters are
replicated, or with "sharded" each device has slices (`trix_jax.lm.sharding`).
`jax.pmap` maps over the devices of one process, `jax.shard_map` over those of one or
many; a test holds them to the same numbers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.jax_utils
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trix_jax.lm.sharding import slices_of, specs_of
from trix_jax.lm.step import AXIS, TrainState

Mapping = Literal["jit", "pmap", "shard_map", "sharded"]
Devices = Sequence[jax.Device]


def mapping_over(devices: Devices, is_sharded: bool = False) -> Mapping:
    """How a step is mapped over devices unless somebody says otherwise."""
    if is_sharded and len(devices) > 1:
        return "sharded"
    if any(device.process_index != jax.process_index() for device in devices):
        return "shard_map"
    return "jit" if len(devices) == 1 else "pmap"


def compile_step(
    make_step: Callable[..., Callable],
    devices: Devices,
    mapping: Mapping | None = None,
) -> Callable:
    """Compiles `make_step(axis_name)`, or `make_step(axis_name, slices)` if sharded, a
    `(state, batch) -> (state, metrics)`; the state's buffers are reused.

    Returns a function that takes a placed state (see `place`) and a host batch
    `[accumulate, B, L + 1]`, under `shard_map` the same global batch in every process.
    """
    match mapping or mapping_over(devices):
        case "jit":
            return jax.jit(make_step(None), donate_argnums=0)
        case "pmap":
            return _pmapped(make_step, devices)
        case "shard_map" | "sharded" as kind:
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
    mesh, rows = _mesh(devices), P(None, AXIS)

    @partial(jax.jit, donate_argnums=0)
    def mapped(state, batch):
        slices = slices_of(state.params, AXIS, len(devices))
        step = make_step(AXIS, slices) if mapping == "sharded" else make_step(AXIS)
        specs = _specs(state, len(devices), mapping)
        # With the check on, gradients of replicated arguments arrive summed over the
        # axis already.
        return jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(specs, rows),
            out_specs=(specs, P()),
            check_vma=False,
        )(state, batch)

    def step(state, batch):
        split = NamedSharding(mesh, rows)
        cut = jax.make_array_from_callback(batch.shape, split, lambda at: batch[at])
        return mapped(state, cut)

    return step


def check_batch(batch_size: int, accumulate: int, devices: Devices) -> None:
    """Raises a ValueError unless the micro-batches split evenly over the devices."""
    if batch_size % (accumulate * len(devices)):
        raise ValueError(
            f"train.batch_size={batch_size} must be a multiple of accumulate={accumulate} times {len(devices)} devices."
        )


def place(state: Any, devices: Devices, mapping: Mapping | None = None) -> Any:
    """Puts a state on the devices: as it is on one, a copy each on several."""
    match mapping or mapping_over(devices):
        case "jit":
            return jax.device_put(state, devices[0])
        case "pmap":
            return flax.jax_utils.replicate(state, list(devices))
        case "shard_map" | "sharded" as kind:
            state, mesh = jax.device_get(state), _mesh(devices)
            specs = _specs(state, len(devices), kind)
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
        case "sharded":
            return jax.tree.map(_whole, state)


def _mesh(devices: Devices) -> Mesh:
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def _specs(state: TrainState, count: int, mapping: Mapping) -> TrainState:
    """How a state lies on the mesh."""
    specs = jax.tree.map(lambda _: P(), state)
    if mapping != "sharded":
        return specs
    return specs._replace(
        params=specs_of(state.params, AXIS, count),
        opt_state=specs_of(state.opt_state, AXIS, count),
    )


def _put(mesh: Mesh, leaf: Any, spec: P) -> jax.Array:
    leaf, sharding = np.asarray(leaf), NamedSharding(mesh, spec)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda at: leaf[at])


def _whole(leaf: jax.Array) -> np.ndarray:
    """An array of which this process may hold a part only; all processes ask together."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
