"""Compiles the kernels for a GPU that is not here, and models their time.

    python -m trix_kernels.aot h100

Needs the packages of the dependency group `aot`, no GPU and no CUDA installation. A
kernel that a target does not support aborts the process, so `report` starts one per
target.

    modelled_us = max(bytes / bandwidth, tensor clocks, decode clocks)   per core, its counts
    roofline_us = the same with each byte once, each weight decoded once at 1.9
                  instructions, and work spread evenly over all cores

Bytes are those of the kernel's copies, on the assumption that what programs of one wave
read again (the words of a tile, the rows of a block) comes from the L2 cache. Programs
that share a core overlap each other's decode and tensor work; one alone has to wait for
the decode of the first plane of a step (Hopper) or of the whole step (Blackwell).
Launches, latencies, clocks below boost and queues in the memory system are not in the
model.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from trix_kernels.gpu_specs import GPUS, LANES, Gpu, target_config
from trix_kernels.weights import PLANES

DECODE_ROOFLINE = 1.9  # instructions a weight that the roofline grants
NARROW = 32  # rows below which a matrix instruction is assumed to get no faster


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one shape: `rows` of each of `tiles` tiles, in blocks of `block`."""

    op: str
    tiles: int
    rows: int
    block: int
    d_in: int
    d_out: int
    hidden: int = 0
    groups: int = 1

    def on(self, gpu: Gpu) -> "Case":
        """The case with blocks that suit a GPU."""
        from trix_kernels.device import ARCHS
        from trix_kernels.tile_matmul.api import most_rows

        most = most_rows(ARCHS[gpu.capability], self.groups)
        return dataclasses.replace(self, block=min(self.block, most))

    @property
    def name(self) -> str:
        widths = [self.d_in, self.hidden, self.d_out]
        shape = "x".join(str(width) for width in widths if width)
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.op}, {self.tiles} x {self.rows} rows, {shape}{groups}"

    @property
    def blocks(self) -> int:
        return self.tiles * -(-self.rows // self.block)

    @property
    def weights(self) -> int:
        """Of all tiles."""
        if self.hidden:
            return self.tiles * self.hidden * (self.d_in + self.d_out)
        return self.tiles * self.d_in * self.d_out


CASES = (
    Case("ternary_matmul", 1, 4096, 128, 4096, 4096),
    Case("ternary_matmul", 1, 16, 16, 4096, 4096),
    Case("ternary_matmul", 1, 1, 8, 4096, 4096),
    Case("tile_matmul", 16, 512, 128, 2048, 2048),
    Case("tile_matmul", 16, 512, 128, 2048, 2048, groups=16),
    Case("tile_matmul", 64, 128, 64, 512, 512),
    Case("tile_matmul", 64, 16, 16, 2048, 2048),
    Case("tile_matmul", 64, 1, 8, 2048, 2048),
    Case("tile_matmul", 64, 1, 8, 512, 128),
    Case("tile_ffn", 16, 512, 64, 512, 512, hidden=512),
    Case("tile_ffn", 64, 128, 64, 512, 512, hidden=128),
    Case("tile_ffn", 64, 16, 16, 1024, 1024, hidden=1024),
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
    from trix_kernels.tile_ffn.mosaic_gpu import tile_ffn
    from trix_kernels.tile_matmul import blackwell, hopper

    arch = ARCHS[gpu.capability]

    def abstract(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def weights(rows, outputs):
        words = abstract((case.tiles, outputs, rows // PLANES), jnp.uint16)
        return words, abstract((case.tiles, case.groups, outputs), jnp.float32)

    x = abstract((case.blocks, case.block, case.d_in), jnp.bfloat16)
    index = abstract((case.blocks,), jnp.int32), abstract((1,), jnp.int32)
    if case.hidden:
        up, down = weights(case.d_in, case.hidden), weights(case.hidden, case.d_out)

        def fused(x, up, down, tile, used):
            act = lambda h: jnp.square(jnp.maximum(h, 0))  # noqa: E731
            return tile_ffn(x, up, down, tile, used, act, arch)

        jax.jit(fused).lower(x, up, down, *index).compile()
        return
    kernel = hopper.tile_matmul if arch == "sm_90a" else blackwell.tile_matmul
    jax.jit(kernel).lower(x, *weights(case.d_in, case.d_out), *index).compile()


def model(case: Case, gpu: Gpu, compiled: Any) -> dict[str, float]:
    """Time of a case by the formula above, and its roofline, in microseconds."""
    from trix_kernels.tile_matmul.hopper import features_of_program

    per_weight = compiled.decode_instructions_per_weight
    block_weights = case.weights / case.tiles
    if case.hidden:
        programs, passes = case.blocks, 1
    else:
        features = features_of_program(case.blocks, case.d_out)
        features = 128 if gpu.capability == "10.0" else features
        passes = case.d_out // features
        programs = case.blocks * passes
    resident = (
        min(gpu.shared_bytes // compiled.smem_bytes, 512 // compiled.registers) or 1
    )
    busiest = -(-programs // gpu.cores) / passes * block_weights  # weights it decodes
    hertz = gpu.clock_ghz * 1e9
    tensor = busiest * max(case.block, NARROW) / gpu.macs / hertz
    decode = busiest * per_weight / LANES / hertz
    activations = 2 * case.blocks * case.block * (case.d_in + case.d_out)
    scales = 4 * case.tiles * case.groups * (case.hidden + case.d_out)
    moved = case.weights / 4 + scales + activations
    rows = case.tiles * case.rows
    least = case.weights / 4 + scales + 2 * rows * (case.d_in + case.d_out)
    is_alone = min(resident, programs / gpu.cores) < 2
    # Hopper decodes a plane while the tensor core multiplies the one before; Blackwell
    # decodes all planes of a step first.
    exposed = is_alone * decode / (PLANES if gpu.capability == "9.0" else 1)
    spread = gpu.cores * hertz
    roofline = max(
        least / gpu.bandwidth,
        case.weights / case.tiles * rows / gpu.macs / spread,
        case.weights * DECODE_ROOFLINE / LANES / spread,
    )
    bf16 = 2 * case.weights + 2 * rows * (case.d_in + case.d_out)
    return {
        "bytes_moved": int(moved),
        "bytes_minimum": int(least),
        "bytes_of_bfloat16": bf16,
        "programs_a_core": min(resident, -(-programs // gpu.cores)),
        "modelled_us": 1e6 * max(moved / gpu.bandwidth, tensor + exposed, decode),
        "bytes_us": 1e6 * moved / gpu.bandwidth,
        "tensor_us": 1e6 * tensor,
        "decode_us": 1e6 * decode,
        "roofline_us": 1e6 * roofline,
    }


def main(target: str) -> dict[str, Any]:
    """Compiles in this process, whose environment is `environment`'s."""
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from trix_kernels import sass

    gpu = GPUS[target]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(gpu), topology="1x1x1"
    )
    mesh = topologies.make_mesh(topology, (1,), ("device",))
    folder, kernels = Path(os.environ["MOSAIC_GPU_DUMP_TO"]), []
    for case in (case.on(gpu) for case in CASES):
        before = set(folder.glob("*.ptxas"))
        compile_case(case, gpu, NamedSharding(mesh, PartitionSpec()))
        (new,) = set(folder.glob("*.ptxas")) - before
        compiled = sass.read(folder, new.stem)
        kernels.append(
            {
                "name": case.name,
                "registers": compiled.registers,
                "spill_bytes": compiled.spill_bytes,
                "smem_bytes": compiled.smem_bytes,
                "decode_instructions_per_weight": round(
                    compiled.decode_instructions_per_weight, 3
                ),
                "decode_opcodes": compiled.decode,
                **{k: round(v, 3) for k, v in model(case, gpu, compiled).items()},
            }
        )
    return {"target": target, "gpu": gpu.name, "kernels": kernels}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
