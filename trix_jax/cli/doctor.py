"""`trix-jax doctor`: the smoke test, and what runs where."""

import dataclasses
import platform
from importlib import metadata
from typing import Any

from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "optax", "orbax-checkpoint", "grain")


@dataclasses.dataclass(frozen=True)
class Args:
    """Check the installation: versions, devices, and every layer's forward and backward
    pass.
    """

    json: bool = False
    """End standard output with the result as one line of JSON."""


def main(argv: list[str]) -> int:
    """Prints what is installed, tries every layer, and says which kernels run here; 1
    if a check fails.
    """
    args = parse(Args, argv, "doctor")
    report = say(args.json)
    versions = {name: _version(name) for name in PACKAGES}
    report(
        f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    for name, version in versions.items():
        report(f"  {name} {version or 'not installed (the lm extra brings it)'}")
    devices = _devices()
    for device, implementation in devices.items():
        report(f"{device}: {implementation}")
    choices = _choices()
    for line in choices:
        report(f"  {line}")
    checks = _smoke()
    for name, problem in checks.items():
        report(
            f"{'ok  ' if problem is None else 'FAIL'} {name}{f': {problem}' if problem else ''}"
        )
    passed = not any(checks.values())
    report("SMOKE PASS" if passed else "SMOKE FAIL")
    if args.json:
        print_json(
            {
                "passed": passed,
                "versions": versions,
                "devices": devices,
                "choices": choices,
                "checks": checks,
            }
        )
    return 0 if passed else 1


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    """Each device, and which implementation of the matmuls runs on it."""
    import jax

    from trix_jax import ops
    from trix_kernels import device
    from trix_kernels.grouped_matmul import device_reason

    reason, grouped = device.unsupported_reason(), device_reason()
    runs = f"XLA. {reason}" if reason else f"Mosaic GPU kernels ({device.arch()})"
    if not reason and all("mosaic_gpu" not in line for line in _choices()):
        runs += " where they are asked for"
    if not reason:
        if grouped:
            runs += f", XLA for grouped products of whole weights. {grouped}"
        elif why := ops.whole_reason():
            runs += f"; XLA for the FFN in training. {why}"
        else:
            runs += (
                "; the FFN in training too, in bfloat16 with widths in multiples of 128"
            )
    return {f"{d.platform} {d.device_kind}": runs for d in jax.devices()}


def _choices() -> list[str]:
    """What is taken where both the kernels and XLA's path run, and why."""
    from trix_kernels import choice, device

    arch = device.arch()
    return [] if device.unsupported_reason() or arch is None else choice.told(arch)


def _smoke() -> dict[str, str | None]:
    """The original's smoke test for every layer: name to what is wrong, None where nothing
    is.
    """
    import trix_jax

    layers: dict[str, Any] = {
        "SparseTriXFFN": trix_jax.SparseTriXFFN(d_model=64),
        "HierarchicalTriXFFN": trix_jax.HierarchicalTriXFFN(
            d_model=64, num_tiles=8, tiles_per_cluster=4
        ),
        "SparseLookupFFN": trix_jax.SparseLookupFFN(
            d_model=64, num_tiles=8, tiles_per_cluster=4
        ),
    }
    return {name: _check(layer) for name, layer in layers.items()}


def _check(layer) -> str | None:
    import jax
    import jax.numpy as jnp

    from trix_jax import freeze

    x = jax.random.normal(jax.random.key(0), (2, 16, 64))
    variables = jax.jit(layer.init)(jax.random.key(1), x)

    def loss(params):
        output, info, aux = layer.apply({**variables, "params": params}, x)
        return jnp.sum(jnp.square(output)) + aux["total_aux"], (output, info, aux)

    (_, (output, info, _)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        variables["params"]
    )
    if output.shape != x.shape:
        return f"output should be {x.shape}. Got {output.shape}."
    if not bool(jnp.isfinite(output).all()):
        return "output is not finite."
    if bool((output == 0).all()):
        return "output is zero."
    if int(info.counts.sum()) != 32:
        return f"32 tokens should be routed. Got {int(info.counts.sum())}."
    still = [
        jax.tree_util.keystr(k)
        for k, g in jax.tree_util.tree_leaves_with_path(grads)
        if not bool((g != 0).any())
    ]
    if still:
        return f"no gradient reaches {', '.join(still)}."
    # Bits are compared between forward passes: a backward pass beside may be fused
    # otherwise.
    forward = jax.jit(lambda variables: layer.apply(variables, x)[0])
    packed, output = forward(freeze(layer, variables, x)), forward(variables)
    if not bool((packed == output).all()):
        return f"the packed layer differs by {float(jnp.abs(packed - output).max())}."
    return None
