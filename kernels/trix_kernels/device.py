"""Which GPU the Mosaic kernels would be compiled for, and why not where they cannot be."""

from typing import Literal

import jax

Arch = Literal["sm_90a", "sm_100a"]

ARCHS: dict[str, Arch] = {"9.0": "sm_90a", "10.0": "sm_100a"}
_REASONS = {
    "8": "Pallas Mosaic GPU kernels need Hopper or newer; this GPU is older",
    "11": "JAX 0.12 cannot compile Mosaic GPU kernels for it",
    "12": "JAX 0.12 cannot compile Mosaic GPU kernels for it",
}


def arch() -> Arch | None:
    """The architecture of the default device; None where there is no kernel for it."""
    return ARCHS.get(_capability(jax.devices()[0]))


def unsupported_reason() -> str | None:
    """Why the default device runs the XLA path; None where the Mosaic kernels run."""
    device = jax.devices()[0]
    return reason_for(device.platform, device.device_kind, _capability(device))


def reason_for(platform: str, kind: str, capability: str) -> str | None:
    """Why a device runs the XLA path; None where the Mosaic kernels run."""
    if platform != "gpu":
        return f"The Mosaic GPU kernels need a GPU. This is {platform}."
    if capability in ARCHS:
        return None
    why = _REASONS.get(capability.split(".")[0], "there is no kernel for it")
    return f"{kind} has compute capability {capability}: {why}."


def _capability(device: jax.Device) -> str:
    return str(getattr(device, "compute_capability", ""))
