"""Several processes that train one model: what they agree on, and who writes.

Every process runs the same program on the same files. All read the same global batches
and evaluate the validation split together; only the first writes, but for the slices of
a sharded state, of which each writes its own. The launcher is SLURM's, Kubernetes' or another's (docs/launch).
"""

import os
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

AGREE_EVERY = 8  # steps between exchanges of requests, which wait for the slowest
TIMEOUT_SECONDS = 60  # after which a silent process is taken for dead


def join() -> None:
    """Connects the processes of one run. Must come before JAX starts a backend.

    JAX finds out by itself under SLURM, Open MPI and on Cloud TPU; elsewhere the
    environment says: `JAX_COORDINATOR_ADDRESS` (host:port of the first process),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Raises:
        ValueError: neither does.
    """
    number, mine = (
        None if (value := os.environ.get(name)) is None else _whole(name, value)
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    )
    jax.distributed.initialize(
        num_processes=number,
        process_id=mine,
        heartbeat_timeout_seconds=TIMEOUT_SECONDS,
        shutdown_timeout_seconds=TIMEOUT_SECONDS,
    )


def leave_if_joined(code: int) -> None:
    """Ends a process that failed, so that the others notice at once.

    Python's own end would wait TIMEOUT_SECONDS for all to end together.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def first_then_others[Result](action: Callable[[], Result], name: str) -> Result:
    """Runs an action on the first process, and on the others when it is done there."""
    result = action() if is_first() else None
    wait_for_all(name)
    return action() if result is None else result


def wait_for_all(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def from_first(value: int) -> int:
    """The first process's value, on all."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_asks(is_time: bool, *asks: bool) -> tuple[bool, ...]:
    """Whether any process asks, the same answer on all.

    Args:
        is_time: whether several processes exchange what they ask, the same on all; if
            not the answer is no. A single process is answered at once.
        asks: what this process asks.
    """
    if jax.process_count() == 1:
        return asks
    if not is_time:
        return tuple(False for _ in asks)
    gathered = multihost_utils.process_allgather(np.asarray(asks))
    return tuple(bool(asked) for asked in gathered.any(axis=0))


def check_same(what: str, sha256: str) -> None:
    """Raises a ValueError unless all processes have the same hash of `what`."""
    if jax.process_count() == 1:
        return
    mine = np.frombuffer(bytes.fromhex(sha256), np.uint8)
    gathered = multihost_utils.process_allgather(mine)
    differ = [i for i, row in enumerate(gathered) if (row != gathered[0]).any()]
    if differ:
        raise ValueError(
            f"{what} must be the same everywhere. Got another on {differ}."
        )


def _whole(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ValueError(f"{name} must be a whole number. Got {value!r}.")
    return int(value)
