"""One device or several: the same per-device step under `jax.jit` or `jax.pmap`.

Parameters are replicated and the batch is split along its second axis, `[accumulate, B, L + 1]`. One process.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.jax_utils
import jax
import numpy as np

from trix_jax.lm.step import AXIS


def compile_step(
    make_step: Callable[[str | None], Callable], devices: Sequence[jax.Device]
) -> Callable:
    """Compiles `make_step(axis_name)`, a `(state, batch) -> (state, metrics)`; the state's buffers are reused.

    Returns a function that takes a placed state (see `place`) and a host batch `[accumulate, B, L + 1]`.
    """
    if len(devices) == 1:
        return jax.jit(make_step(None), donate_argnums=0)
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


def check_batch(
    batch_size: int, accumulate: int, devices: Sequence[jax.Device]
) -> None:
    """Raises a ValueError unless the micro-batches split evenly over the devices."""
    if batch_size % (accumulate * len(devices)):
        raise ValueError(
            f"train.batch_size={batch_size} must be a multiple of accumulate={accumulate} times {len(devices)} devices."
        )


def place(state: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts a state on the devices: as it is on one, a copy each on several."""
    if len(devices) == 1:
        return jax.device_put(state, devices[0])
    return flax.jax_utils.replicate(state, list(devices))


def fetch(state: Any, devices: Sequence[jax.Device]) -> Any:
    """The state as one copy on the host."""
    return jax.device_get(
        state if len(devices) == 1 else flax.jax_utils.unreplicate(state)
    )
