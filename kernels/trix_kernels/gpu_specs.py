"""GPUs to compile and model for, none of which need be there: XLA's target configs and
what the model needs.

Figures are the vendors' data sheets' (dense bfloat16, SXM parts); L2 bandwidth is not
in them and not modelled.
"""

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU.

    Attributes:
        capability: compute capability.
        cores: streaming multiprocessors.
        clock_ghz: boost clock.
        bandwidth: of device memory, bytes a second.
        macs: bfloat16 multiply-accumulates of a core's tensor units in a clock.
        shared_bytes: shared memory that a program can have.
        memory_bytes: of the device.
    """

    name: str
    capability: str
    cores: int
    clock_ghz: float
    bandwidth: float
    macs: int
    shared_bytes: int
    memory_bytes: int


GPUS = {
    "h100": Gpu(
        "NVIDIA H100 80GB HBM3", "9.0", 132, 1.755, 3.35e12, 2048, 232448, 80 * 2**30
    ),
    "b200": Gpu("NVIDIA B200", "10.0", 148, 1.85, 8.0e12, 4096, 232448, 180 * 2**30),
    "thor": Gpu(
        "NVIDIA Jetson Thor", "11.0", 20, 1.575, 0.273e12, 4096, 232448, 128 * 2**30
    ),
}

TENSOR_COLUMNS = 512  # of Blackwell's tensor memory; our kernels take 256 a program
LANES = 128  # integer instructions that a core issues in a clock, one per lane


def target_config(gpu: Gpu) -> str:
    """XLA's description of a GPU, in protobuf text, for `jax.experimental.topologies`."""
    major, minor = gpu.capability.split(".")
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048
  core_count: {gpu.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(gpu.bandwidth)} l2_cache_size: 52428800
  clock_rate_ghz: {gpu.clock_ghz} device_memory_size: {gpu.memory_bytes}
  shared_memory_per_block_optin: {gpu.shared_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.name}"
"""
