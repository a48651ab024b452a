"""Where the processes of an experiment run: a slot is a GPU, a share of one, or some
CPU cores.
"""

import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple


class Slot(NamedTuple):
    """Where a process runs: environment to add, and cores to stay on."""

    name: str
    env: dict[str, str]
    cores: frozenset[int]


def make_slots(count: int | None = None) -> list[Slot]:
    """The slots of this machine: one a GPU, or one a core.

    Args:
        count: other than one a device: several share a GPU's memory, or fewer share
            the cores.
    """
    gpus = _gpus()
    if not gpus:
        cores = _cores()
        count = count or len(cores)
        groups = [frozenset(cores[i % len(cores) :: count]) for i in range(count)]
        return [Slot(f"core {min(group)}", {}, group) for group in groups]
    count = count or len(gpus)
    each = -(-count // len(gpus))
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / each:.2f}"} if each > 1 else {}
    names = [gpus[i % len(gpus)] for i in range(count)]
    return [
        Slot(f"GPU {name}", {"CUDA_VISIBLE_DEVICES": name} | share, frozenset())
        for name in names
    ]


def prelude(slot: Slot) -> str:
    """What a process of a slot does before all else, as Python: stay on its cores, and
    save when we are killed. Not a `preexec_fn`, which is not safe where there are
    threads.
    """
    lines = []
    if slot.cores and hasattr(os, "sched_setaffinity"):
        lines.append(f"import os; os.sched_setaffinity(0, {sorted(slot.cores)})")
    if sys.platform == "linux":  # PR_SET_PDEATHSIG is 1
        call = f"ctypes.CDLL(None).prctl(1, {int(signal.SIGTERM)})"
        lines.append(f"import ctypes; {call}")
    return "".join(f"{line}\n" for line in lines)


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs that a process of ours may use, without loading CUDA. As
    for CUDA, -1 ends the list.
    """
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in named.split(",")]
        ended = (i for i, name in enumerate(names) if name.startswith("-"))
        return [name for name in names[: next(ended, None)] if name]
    found = (re.fullmatch(r"nvidia(\d+)", p.name) for p in Path("/dev").glob("nvidia*"))
    return sorted((match[1] for match in found if match), key=int)
