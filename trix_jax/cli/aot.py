"""`trix-jax aot --target GPU`: compile the kernels and train steps for a GPU that is
not here.
"""

import dataclasses
from importlib import util
from typing import Any, Literal

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile for a GPU that is not here: resources of every kernel, modelled times,
    memory of train steps.
    """

    target: Literal["h100", "b200"] = "h100"
    """Which GPU."""
    configs: bool = True
    """Compile train steps too, on 1 and 8 GPUs: minutes."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> int:
    """Prints the tables; 1 if a kernel spills registers."""
    from trix_kernels import aot

    args = parse(Args, argv, "aot")
    if util.find_spec("jax_cuda13_plugin") is None:
        raise RuntimeError(
            "jax-cuda13-plugin, nvidia-cuda-nvcc, nvidia-nvvm and nvidia-cuda-nvdisasm "
            "are missing: uv sync --group aot brings them."
        )
    report = say(args.json)
    result: dict[str, Any] = aot.report(args.target)
    report(f"{result['gpu']}, kernels compiled, times modelled:")
    report(kernel_table(result["kernels"]))
    grouped = result.get("grouped", [])
    if grouped:
        report("Products of whole weights, as in training:")
        report(grouped_table(grouped))
    from trix_jax.lm import aot as train_steps

    result["training"] = train_steps.compile_training(args.target)
    report(f"One FFN, forward and backward, {_products_of(args.target)}:")
    report(training_table(result["training"]))
    if args.configs:
        result["configs"] = train_steps.compile_configs(args.target)
        report(config_table(result["configs"]))
    if args.json:
        print_json(result)
    kernels = [*result["kernels"], *grouped, *result["training"]]
    return 1 if any(k["spill_bytes"] for k in kernels) else 0


def _products_of(target: str) -> str:
    """What computes a training layer's products there."""
    from trix_kernels import device
    from trix_kernels.gpu_specs import GPUS
    from trix_kernels.grouped_matmul import device_reason

    with device.assumed(GPUS[target]):
        reason = device_reason()
    return (
        f"by XLA alone. {reason}" if reason else "its products by our kernels, by name"
    )


def kernel_table(kernels: list[dict[str, Any]]) -> str:
    """Markdown: resources, bytes and times of every kernel."""
    rows = [
        "| kernel | registers | spills | shared memory, bytes | decode instructions a weight "
        "| bytes over minimum | of bfloat16's | modelled us | roofline us | ratio |",
        "|---|" + "---:|" * 9,
    ]
    for k in kernels:
        rows.append(
            f"| {k['name']} | {k['registers']} | {k['spill_bytes']} | {k['smem_bytes']:,} | "
            f"{k['decode_instructions_per_weight']:.2f} | "
            f"{k['bytes_moved'] / k['bytes_minimum']:.3f} | "
            f"{k['bytes_moved'] / k['bytes_of_bfloat16']:.2f} | {k['modelled_us']:.2f} | "
            f"{k['roofline_us']:.2f} | {k['modelled_us'] / k['roofline_us']:.2f} |"
        )
    return "\n".join(rows)


def grouped_table(products: list[dict[str, Any]]) -> str:
    """Markdown: resources and times of every product of whole weights."""
    rows = [
        "| product | registers | spills | shared memory, bytes | MB | bytes, us | tensor, us "
        "| modelled us |",
        "|---|" + "---:|" * 7,
    ]
    for p in products:
        rows.append(
            f"| {p['name']} | {p['registers']} | {p['spill_bytes']} | {p['smem_bytes']:,} | "
            f"{p['bytes_moved'] / 1e6:.0f} | {p['bytes_us']:.1f} | {p['tensor_us']:.1f} | "
            f"{p['modelled_us']:.1f} |"
        )
    return "\n".join(rows)


def training_table(layers: list[dict[str, Any]]) -> str:
    """Markdown: what a layer starts and holds, and its time beside the dense FFN's."""
    rows = [
        "| layer | loops | launches | our kernels | temporaries, MiB | modelled us "
        "| dense of equal parameters, us | ratio |",
        "|---|" + "---:|" * 7,
    ]
    for row in layers:
        ours, dense = row["modelled_us"], row["dense_modelled_us"]
        rows.append(
            f"| {row['name']} | {row['while_loops']} | {row['launches']} | {row['kernels']} | "
            f"{row['temporary_bytes'] / 2**20:,.0f} | {ours:,.0f} | {dense:,.0f} | "
            f"{dense / ours:.2f} |"
        )
    return "\n".join(rows)


def config_table(configs: list[dict[str, Any]]) -> str:
    """Markdown: memory and collectives of every train step."""
    rows = [
        "| train step | GPUs | peak MiB a GPU | collectives |",
        "|---|---:|---:|---|",
    ]
    for c in configs:
        found = ", ".join(f"{n} {name}" for name, n in c["collectives"].items())
        rows.append(
            f"| {c['name']} | {c['devices']} | {c['peak_bytes'] / 2**20:,.0f} | {found or '-'} |"
        )
    return "\n".join(rows)
