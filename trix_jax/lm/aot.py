"""Train steps and FFN layers compiled for GPUs that are not here: memory, collectives,
launches and modelled times.

    python -m trix_jax.lm.aot h100
    python -m trix_jax.lm.aot h100 training         # the FFN, forward and backward
    python -m trix_jax.lm.aot h100 - < case.json    # what `compile_case` sends

Run in a process with the environment of `trix_kernels.aot.environment`.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from trix_jax.lm.config import TrainConfig, model_from_tree
from trix_jax.lm.train import parallel
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.block import DenseFFN
from trix_jax.nn.sparse_ffn import SparseTriXFFN
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_kernels import aot, device, hlo, sass, times
from trix_kernels.gpu_specs import GPUS, target_config
from trix_kernels.grouped_matmul import device_reason

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
        router_input="hidden",
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
LAYER_TOKENS = jax.ShapeDtypeStruct((16384, 1024), jnp.bfloat16)  # of `compile_layer`
LAYER_WIDTH = 256
COLLECTIVES = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("
)


def compile_configs(target: str) -> list[dict[str, Any]]:
    """Compiles every config for 1 and 8 GPUs of a target, in a process of its own.

    Raises:
        RuntimeError: the compilation failed; the message ends with what it printed.
    """
    return _in_a_process([sys.executable, "-m", "trix_jax.lm.aot", target], target)


def compiler() -> str | None:
    """A Python that has the aot group, or None: `$TRIX_AOT_PYTHON`, or this one."""
    if named := os.environ.get("TRIX_AOT_PYTHON"):
        return named
    return sys.executable if util.find_spec("jax_cuda13_plugin") else None


def compile_case(
    python: str,
    target: str,
    model: TransformerConfig,
    batch_size: int,
    accumulate: int,
    devices: int,
    optimizer: str = "adamw",
) -> dict[str, Any]:
    """Compiles the train step of one config, in a process of its own.

    Args:
        python: with the aot group (`compiler`).
        target: a GPU.
        model: resolved.
        batch_size: over all devices and micro-batches.
        accumulate: micro-batches.
        devices: data parallel.
        optimizer: see `TrainConfig`.

    Raises:
        RuntimeError: the compilation failed; the message ends with what it printed.
    """
    case = {
        "optimizer": optimizer,
        "model": dataclasses.asdict(model),
        "batch_size": batch_size,
        "accumulate": accumulate,
        "devices": devices,
    }
    command = [python, "-m", "trix_jax.lm.aot", target, "-"]
    return _in_a_process(command, target, json.dumps(case))


def _in_a_process(command: list[str], target: str, text: str = "") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            command,
            env=aot.environment(folder) | {"PYTHONPATH": os.pathsep.join(_folders())},
            input=text,
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


def sources() -> list[Path]:
    """The files that a compiled step is made of."""
    package, kernels = Path(__file__).parents[1], Path(aot.__file__).parent
    train = "step loss optimizer parallel sharding".split()
    lm = [package / "lm" / "train" / f"{name}.py" for name in train]
    found = (package.glob("*.py"), package.glob("nn/*.py"), kernels.rglob("*.py"))
    return [Path(__file__), *lm, *(file for each in found for file in sorted(each))]


def _folders() -> list[str]:
    """Where this package, the kernels and what the lm extra brings lie, for a Python
    that has only the aot group.
    """
    own = [str(Path(file).parents[n]) for file, n in ((__file__, 2), (aot.__file__, 1))]
    return [*own, sysconfig.get_path("purelib")]


def compile_train_step(
    model: TransformerConfig,
    target: str,
    devices: int,
    mapping: parallel.Mapping = "shard_map",
    batch_size: int | None = None,
    accumulate: int = 1,
    optimizer: Any = "adamw",
) -> dict[str, Any]:
    """Compiles one step as the training lane maps it, and reads what it needs.

    With XLA's attention, since cuDNN's does not compile for a GPU that is not here: where
    a run takes cuDNN's, `peak_bytes` and `temporary_bytes` are more than it needs.
    """
    model = dataclasses.replace(model, attention="xla")
    batch_size = batch_size or BATCH * devices
    topology = topologies.get_topology_desc(
        platform="cuda",
        target_config=target_config(GPUS[target]),
        topology=f"1x{devices}x1",
    )
    sizes = parallel.axis_sizes(devices, mapping)
    mesh = topologies.make_mesh(topology, tuple(sizes.values()), tuple(sizes))
    config = TrainConfig(
        steps=1000, batch_size=batch_size, accumulate=accumulate, optimizer=optimizer
    )
    lm, transform = TransformerLM(model), make_optimizer(config)
    make = partial(make_train_step, lm, transform, config)
    with device.assumed(GPUS[target]):
        state = jax.eval_shape(lambda: init_state(lm, transform, 0))

    def place(x, spec):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
        )

    state = jax.tree.map(place, state, parallel.state_specs(state, mesh, mapping))
    rows = (accumulate, batch_size // accumulate, model.context + 1)
    batch = place(jax.ShapeDtypeStruct(rows, jnp.int32), parallel.rows_over(mesh))
    step = parallel.shard_mapped(make, mesh, mapping)
    with device.assumed(GPUS[target]):
        compiled = step.lower(state, batch).compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    found = Counter(COLLECTIVES.findall(text))
    one = {}  # times of a GPU that waits for no other
    if devices == 1:
        for name, scope in (("modelled_us", ""), ("attention_us", "/attention/")):
            one[name] = round(times.module_us(text, GPUS[target], scope), 1)
    return one | {
        "devices": devices,
        "attention": model.attention,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "collectives": dict(found),
    }


def compile_training(target: str) -> list[dict[str, Any]]:
    """`compile_layer` with 16 and with 64 tiles, each beside the dense FFN of equal
    parameters, in a process of its own.

    Raises:
        RuntimeError: the compilation failed; the message ends with what it printed.
    """
    command = [sys.executable, "-m", "trix_jax.lm.aot", target, "training"]
    return _in_a_process(command, target)


def training(target: str) -> list[dict[str, Any]]:
    """The same in this process."""
    return [
        compile_layer(target, tiles)
        | {"dense_modelled_us": _dense_us(target, tiles * LAYER_WIDTH)}
        for tiles in (16, 64)
    ]


def compile_layer(target: str, tiles: int) -> dict[str, Any]:
    """Compiles forward and backward of one layer (16,384 tokens, D=1024, F=256, K=4,
    bfloat16) on our kernels where the target has them, whatever the default is, counts
    what it starts, and models its time (`trix_kernels.times`).

    `routing_launches` are those of scores, selection, gates, counts and the plan, in
    both passes, with what the compiler made without a name; not of the balance losses.
    Registers that spill and wgmmas that wait for each other are those of our kernels.
    """
    with device.assumed(GPUS[target]):
        implementation = "xla" if device_reason() else "mosaic_gpu"
    layer = SparseTriXFFN(
        LAYER_TOKENS.shape[1],
        num_tiles=tiles,
        expansion=tiles * LAYER_WIDTH // LAYER_TOKENS.shape[1],
        tiles_per_token=4,
        dtype=jnp.bfloat16,
        implementation=implementation,
    )
    folder = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    before = set(folder.glob("*.ptxas"))
    compiled = _compile_gradient(layer, target)
    new = set(folder.glob("*.ptxas")) - before
    kernels = [sass.resources(folder, file.stem) for file in new]
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    launches = hlo.launches(text)
    return {
        "name": f"FFN forward + backward, {tiles} tiles",
        "tiles": tiles,
        "implementation": implementation,
        "while_loops": hlo.while_loops(text),
        "launches": len(launches),
        "routing_launches": sum(map(_is_routing, launches)),
        "kernels": sum(launch.target.startswith("mosaic_gpu") for launch in launches),
        "temporary_bytes": memory.temp_size_in_bytes,
        "spill_bytes": sum(kernel.spill_bytes for kernel in kernels),
        "serialized": any(kernel.serialized for kernel in kernels),
        "modelled_us": round(times.module_us(text, GPUS[target]), 1),
    }


def _dense_us(target: str, width: int) -> float:
    """Modelled time of the dense FFN, forward and backward."""
    layer = DenseFFN(LAYER_TOKENS.shape[1], width, "relu2", dtype=jnp.bfloat16)
    text = _compile_gradient(layer, target).as_text() or ""
    return round(times.module_us(text, GPUS[target]), 1)


def _compile_gradient(layer: nn.Module, target: str) -> Any:
    """Output, state and gradients to parameters and tokens, all of them returned."""
    x, gpu = LAYER_TOKENS, GPUS[target]
    with device.assumed(gpu):
        variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(gpu), topology="1x1x1"
    )
    one = NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), P())

    def loss(params, x, dy, state):
        given = {"params": params, "routing": state}
        (y, _, aux), new = layer.apply(given, x, True, mutable=["routing"])
        total = jnp.sum((y * dy).astype(jnp.float32)) + aux["total_aux"]
        return total, (y, new)

    step = jax.jit(jax.grad(loss, (0, 1), has_aux=True), in_shardings=one)
    with device.assumed(gpu):
        args = variables["params"], x, x, variables.get("routing", {})
        return step.lower(*args).compile()


def _is_routing(launch: hlo.Launch) -> bool:
    if not launch.name:
        return launch.op != "copy"  # of state that is returned
    is_loss = "_losses" in launch.name or "_add_margins" in launch.name
    return "/plan/" in launch.name or ("/router/" in launch.name and not is_loss)


def main(target: str) -> list[dict[str, Any]]:
    """Compiles in this process."""
    return [
        {
            "name": f"{name}, {how}" if how else name,
            "target": target,
            **compile_train_step(CONFIGS[name], target, devices, mapping),
        }
        for name, how, devices, mapping in STEPS
    ]


def _case(target: str, case: dict[str, Any]) -> dict[str, Any]:
    model = model_from_tree(case.pop("model"))
    return {"target": target, **compile_train_step(model, target, **case)}


if __name__ == "__main__":
    of, what = sys.argv[1], sys.argv[2:]
    if what == ["-"]:
        found: Any = _case(of, json.load(sys.stdin))
    else:
        found = training(of) if what == ["training"] else main(of)
    print(json.dumps(found))
