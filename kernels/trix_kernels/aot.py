"""Compiles the kernels for a GPU that need not be there, and models their time.

    python -m trix_kernels.aot h100

Needs the packages of the dependency group `aot`, no GPU and no CUDA installation. A
kernel that a target does not support aborts the process, so `report` starts one per
target.

    modelled_us = max(bytes / bandwidth, tensor clocks, decode clocks) + joining
                  per core, the kernel's own counts
    roofline_us = the same with each byte once, each weight decoded once at
                  `DECODE_ROOFLINE` instructions, and work spread evenly over all cores

Bytes are those of the kernel's copies, on the assumption that what programs of one wave
read again (the words of a tile, the rows of a block) comes from the L2 cache. Joining
is the writing and reading of a split contraction's sums, and the rounding of int8
activations, which XLA does around the kernel. Programs that share a core overlap each
other's decode and tensor work; one alone has to wait for the decode of the first plane
of a step (Hopper) or of half a step: the first step of a sum where a kernel's steps
overlap, else every step (Blackwell). Launches, latencies, clocks below boost and queues
in the memory system are not in the model. The products of whole weights have a model of
their own, in `grouped_matmul.cases`.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trix_kernels.gpu_specs import GPUS, LANES, TENSOR_COLUMNS, Gpu, target_config
from trix_kernels.quantize import Activations
from trix_kernels.weights import PLANES, planar_block

# Instructions a weight that the roofline grants: a shift and a mask for 32 bits.
DECODE_ROOFLINE = {"float": 1.0, "int8": 0.5}
NARROW = 32  # rows below which a matrix instruction is assumed to get no faster


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape: `rows` of each of `tiles` tiles, in blocks of `block` (at most
    `tile_matmul.api.most_rows`). An FFN has a `hidden` width, and no kernel of its own.
    """

    op: str
    tiles: int
    rows: int
    block: int
    d_in: int
    d_out: int
    hidden: int = 0
    groups: int = 1
    activations: Activations = "float"

    @property
    def name(self) -> str:
        widths = [self.d_in, self.hidden, self.d_out]
        shape = "x".join(str(width) for width in widths if width)
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        int8 = ", int8" if self.activations == "int8" else ""
        return f"{self.op}, {self.tiles} x {self.rows} rows, {shape}{groups}{int8}"

    def programs(self, gpu: Gpu) -> tuple[int, int]:
        """Programs that share the outputs, and parts of the contraction."""
        from trix_kernels.tile_matmul import blackwell, hopper
        from trix_kernels.tile_matmul.api import splits_of

        kernel = hopper if gpu.capability == "9.0" else blackwell
        count = kernel.programs_of(self.blocks, self.d_out)
        return count, splits_of(count, kernel.CORES, self.d_in, self.groups)

    @property
    def steps(self) -> int:
        """Planar blocks of the contraction."""
        return self.d_in // planar_block(self.d_in, self.groups)

    @property
    def blocks(self) -> int:
        return self.tiles * -(-self.rows // self.block)

    @property
    def weights(self) -> int:
        """Number of weights in all tiles."""
        if self.hidden:
            return self.tiles * self.hidden * (self.d_in + self.d_out)
        return self.tiles * self.d_in * self.d_out


CASES = (
    Case("ternary_matmul", 1, 4096, 64, 4096, 4096),
    Case("ternary_matmul", 1, 16, 16, 4096, 4096),
    Case("ternary_matmul", 1, 1, 8, 4096, 4096),
    Case("tile_matmul", 16, 512, 64, 2048, 2048),
    Case("tile_matmul", 16, 512, 64, 2048, 2048, groups=16),
    Case("tile_matmul", 64, 128, 64, 512, 512),
    Case("tile_matmul", 64, 16, 16, 2048, 2048),
    Case("tile_matmul", 64, 1, 8, 2048, 2048),
    Case("tile_matmul", 64, 1, 8, 512, 128),
    Case("tile_matmul", 16, 512, 128, 2048, 2048, activations="int8"),
    Case("tile_matmul", 64, 16, 16, 2048, 2048, activations="int8"),
    Case("ternary_matmul", 1, 1, 8, 4096, 4096, activations="int8"),
)


def report(target: str) -> dict[str, Any]:
    """Compiles every case for a target, in a process of its own.

    Raises:
        ValueError: no such target.
        RuntimeError: the compilation failed; the message ends with what it printed.
    """
    if target not in GPUS:
        raise ValueError(f"target must be one of {', '.join(GPUS)}. Got {target!r}.")
    command = [sys.executable, "-m", "trix_kernels.aot", target]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            env=environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = done.stderr.strip()[-2000:]
        raise RuntimeError(
            f"Compiling for {target} ended with {done.returncode}: {last}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def environment(folder: str) -> dict[str, str]:
    """What a process that compiles for absent GPUs needs in its environment."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",  # or the CUDA plugin prints a traceback
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
        "MOSAIC_GPU_DUMP_TO": folder,
    }


def compile_case(case: Case, gpu: Gpu, sharding: Any) -> None:
    """Compiles one case ahead of time; the dumps say what became of it."""
    import jax
    import jax.numpy as jnp

    from trix_kernels.device import ARCHS
    from trix_kernels.tile_matmul import blackwell, hopper

    arch = ARCHS[gpu.capability]

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weights(rows, outputs):
        words = abstract((case.tiles, outputs, rows // PLANES), jnp.uint16)
        return words, abstract((case.tiles, case.groups, outputs), jnp.float32)

    is_int8 = case.activations == "int8"
    dtype = jnp.int8 if is_int8 else jnp.bfloat16
    x = abstract((case.blocks, case.block, case.d_in), dtype)
    index = abstract((case.blocks,), jnp.int32), abstract((1,), jnp.int32)
    kernel = hopper.tile_matmul if arch == "sm_90a" else blackwell.tile_matmul
    kernel = functools.partial(kernel, splits=case.programs(gpu)[1])
    args = x, *weights(case.d_in, case.d_out), *index
    if is_int8:
        args = *args, abstract((case.blocks, case.block), jnp.float32)
    jax.jit(kernel).lower(*args).compile()


def model(case: Case, gpu: Gpu, compiled: Any) -> dict[str, float]:
    """Time of a case by the formula above, and its roofline, in microseconds."""
    is_int8, is_hopper = case.activations == "int8", gpu.capability == "9.0"
    programs, splits = case.programs(gpu)
    share = case.weights / case.tiles / (programs / case.blocks * splits)
    programs *= splits
    resident = min(gpu.shared_bytes // compiled.smem_bytes, 512 // compiled.registers)
    if not is_hopper:
        resident = min(resident, TENSOR_COLUMNS // 256)
    resident = min(resident or 1, -(-programs // gpu.cores))
    busiest = -(-programs // gpu.cores) * share  # weights that one core decodes
    hertz, macs = gpu.clock_ghz * 1e9, gpu.macs * (2 if is_int8 else 1)
    tensor = busiest * max(case.block, NARROW) / macs / hertz
    decode = busiest * compiled.decode_clocks_per_weight / hertz
    exposed = (min(resident, programs / gpu.cores) < 2) * decode
    if is_hopper:
        exposed /= PLANES // 2 if is_int8 else PLANES
    else:
        overlaps = case.groups == 1 and programs < 2 * gpu.cores
        exposed /= 2 * (case.steps // splits if overlaps else 1)
    padded = case.blocks * case.block
    scales = 4 * case.tiles * case.groups * case.d_out
    joining = 8 * splits * padded * case.d_out if splits > 1 else 0
    joining += 3 * padded * case.d_in if is_int8 else 0
    copied = case.weights / 4 + scales + 2 * padded * (case.d_in + case.d_out)
    copied -= padded * case.d_in if is_int8 else 0
    rows = case.tiles * case.rows
    least = case.weights / 4 + scales + 2 * rows * (case.d_in + case.d_out)
    spread = gpu.cores * hertz
    roofline = max(
        least / gpu.bandwidth,
        case.weights / case.tiles * rows / macs / spread,
        case.weights * DECODE_ROOFLINE[case.activations] / LANES / spread,
    )
    slowest = max(copied / gpu.bandwidth, tensor + exposed, decode)
    return {
        "bytes_moved": int(copied + joining),
        "bytes_minimum": int(least),
        "bytes_of_bfloat16": 2 * case.weights + 2 * rows * (case.d_in + case.d_out),
        "splits": splits,
        "programs_a_core": resident,
        "modelled_us": 1e6 * (slowest + joining / gpu.bandwidth),
        "bytes_us": 1e6 * copied / gpu.bandwidth,
        "tensor_us": 1e6 * tensor,
        "decode_us": 1e6 * decode,
        "joining_us": 1e6 * joining / gpu.bandwidth,
        "roofline_us": 1e6 * roofline,
    }


def main(target: str) -> dict[str, Any]:
    """Compiles in this process, whose environment is `environment`'s."""
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from trix_kernels import sass
    from trix_kernels.grouped_matmul import cases

    gpu = GPUS[target]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(gpu), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    folder, kernels = Path(os.environ["MOSAIC_GPU_DUMP_TO"]), []
    for case in CASES:
        if case.activations == "int8" and gpu.capability != "9.0":
            continue  # XLA's path there
        before = set(folder.glob("*.ptxas"))
        compile_case(case, gpu, sharding)
        (new,) = set(folder.glob("*.ptxas")) - before
        compiled = sass.read(folder, new.stem)
        kernels.append(
            {
                "name": case.name,
                "registers": compiled.registers,
                "spill_bytes": compiled.spill_bytes,
                "smem_bytes": compiled.smem_bytes,
                "serialized": compiled.serialized,
                "decode_instructions_per_weight": round(
                    compiled.decode_instructions_per_weight, 3
                ),
                "decode_opcodes": compiled.decode,
                **{k: round(v, 3) for k, v in model(case, gpu, compiled).items()},
            }
        )
    found = {"target": target, "gpu": gpu.name, "kernels": kernels}
    if gpu.capability == "9.0":  # XLA's path elsewhere
        found["grouped"] = cases.report(gpu, sharding, folder)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
