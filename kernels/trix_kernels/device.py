"""Which GPU the Mosaic kernels would be compiled for, and why not where they cannot be."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal, NamedTuple

import jax

from trix_kernels.gpu_specs import Gpu

Arch = Literal["sm_90a", "sm_100a"]

ARCHS: dict[str, Arch] = {"9.0": "sm_90a", "10.0": "sm_100a"}
_REASONS = {
    "8": "Pallas Mosaic GPU kernels need Hopper or newer; this GPU is older",
    "11": "JAX 0.12 cannot compile Mosaic GPU kernels for it",
    "12": "JAX 0.12 cannot compile Mosaic GPU kernels for it",
}


class _Device(NamedTuple):
    platform: str
    kind: str
    capability: str


_assumed: ContextVar[_Device | None] = ContextVar("assumed", default=None)


@contextlib.contextmanager
def assumed(gpu: Gpu) -> Iterator[None]:
    """Kernels are chosen as if this GPU were the default device: for what is compiled
    ahead of time, or interpreted.
    """
    token = _assumed.set(_Device("gpu", gpu.name, gpu.capability))
    try:
        yield
    finally:
        _assumed.reset(token)


def platform() -> str:
    """The platform of the default device: "cpu", "gpu" or "tpu"."""
    return _default().platform


def arch() -> Arch | None:
    """The architecture of the default device; None where there is no kernel for it."""
    return ARCHS.get(_default().capability)


def unsupported_reason() -> str | None:
    """Why the default device runs the XLA path; None where the Mosaic kernels run."""
    return reason_for(*_default())


def reason_for(platform: str, kind: str, capability: str) -> str | None:
    """Why a device runs the XLA path; None where the Mosaic kernels run."""
    if platform != "gpu":
        return f"The Mosaic GPU kernels need a GPU. This is {platform}."
    if capability in ARCHS:
        return None
    why = _REASONS.get(capability.split(".")[0], "there is no kernel for it")
    return f"{kind} has compute capability {capability}: {why}."


def default_device() -> jax.Device:
    """Where JAX puts what nobody places: `jax.default_device`, else the first device."""
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def _default() -> _Device:
    if found := _assumed.get():
        return found
    device = default_device()
    capability = str(getattr(device, "compute_capability", ""))
    return _Device(device.platform, device.device_kind, capability)
