"""Train steps compiled for GPUs that are not here: memory and collectives.

    python -m trix_jax.lm.compile h100

Run in a process with the environment of `trix_kernels.aot.environment`.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from trix_jax.lm import parallel
from trix_jax.lm.config import TrainConfig
from trix_jax.lm.optimizer import make_optimizer
from trix_jax.lm.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_kernels import aot
from trix_kernels.gpu_specs import GPUS, target_config

CONFIGS = {
    "small, hierarchical 64 tiles": TransformerConfig(
        vocab_size=8192,
        context=512,
        d_model=256,
        n_layers=4,
        n_heads=4,
        ffn="hierarchical",
        num_tiles=64,
        tiles_per_cluster=8,
        dtype="bfloat16",
    ),
    "small, dense": TransformerConfig(
        vocab_size=8192,
        context=512,
        d_model=256,
        n_layers=4,
        n_heads=4,
        ffn="dense",
        dtype="bfloat16",
    ),
}
HIERARCHICAL, DENSE = CONFIGS
STEPS: list[tuple[str, str, int, parallel.Mapping]] = [
    (HIERARCHICAL, "", 1, "shard_map"),
    (HIERARCHICAL, "", 8, "shard_map"),
    (HIERARCHICAL, "state sliced", 8, parallel.Spread(is_sliced=True)),
    (HIERARCHICAL, "tiles over 8", 8, parallel.Spread(8)),
    (HIERARCHICAL, "tiles over 4", 8, parallel.Spread(4)),
    (DENSE, "", 1, "shard_map"),
    (DENSE, "", 8, "shard_map"),
]
BATCH = 32  # sequences a GPU
COLLECTIVES = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def report(target: str) -> list[dict[str, Any]]:
    """Compiles every config for 1 and 8 GPUs of a target, in a process of its own.

    Raises:
        RuntimeError: the compilation failed; the message ends with what it printed.
    """
    command = [sys.executable, "-m", "trix_jax.lm.compile", target]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            env=aot.environment(folder),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        last = done.stderr.strip()[-2000:]
        raise RuntimeError(
            f"Compiling train steps for {target} ended with {done.returncode}: {last}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def compile_step(
    model: TransformerConfig,
    target: str,
    devices: int,
    mapping: parallel.Mapping = "shard_map",
) -> dict[str, Any]:
    """Compiles one step as the training lane maps it, and reads what it needs."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=target_config(GPUS[target]),
        topology=f"1x{devices}x1",
    )
    sizes = parallel.axis_sizes(devices, mapping)
    mesh = topologies.make_mesh(topology, tuple(sizes.values()), tuple(sizes))
    config = TrainConfig(steps=1000, batch_size=BATCH * devices)
    lm, optimizer = TransformerLM(model), make_optimizer(config)
    make = partial(make_train_step, lm, optimizer, config)
    state = jax.eval_shape(lambda: init_state(lm, optimizer, 0))
    place = lambda x, spec: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )
    state = jax.tree.map(place, state, parallel.state_specs(state, mesh, mapping))
    batch = jax.ShapeDtypeStruct((1, BATCH * devices, model.context + 1), jnp.int32)
    batch = place(batch, parallel.rows_over(mesh))
    compiled = parallel.shard_mapped(make, mesh, mapping).lower(state, batch).compile()
    memory: Any = compiled.memory_analysis()
    found = Counter(COLLECTIVES.findall(compiled.as_text() or ""))
    return {
        "devices": devices,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "collectives": dict(found),
    }


def main(target: str) -> list[dict[str, Any]]:
    """Compiles in this process."""
    return [
        {
            "name": f"{name}, {how}" if how else name,
            "target": target,
            **compile_step(CONFIGS[name], target, devices, mapping),
        }
        for name, how, devices, mapping in STEPS
    ]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
