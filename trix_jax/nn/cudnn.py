"""Causal attention by cuDNN: the scores never stand in memory.

One call for the whole sequence, in bfloat16 or float16, on CUDA GPUs. Everything else is
`trix_jax.nn.attention.attend`. It has gradients in reverse mode alone, of first order.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from trix_jax import ops
from trix_jax.typing import Array, Float

AttentionKind = Literal["auto", "xla", "cudnn"]

DTYPES = (jnp.bfloat16, jnp.float16)
MOST_WIDTH = {8: 128}  # of a head, by the GPU's major compute capability; later ones
MOST_WIDTH_LATER = 256


def attend(
    q: Float[Array, "B L H E"], k: Float[Array, "B L H E"], v: Float[Array, "B L H E"]
) -> Float[Array, "B L H E"]:
    """Computes `softmax(q k^T / sqrt(E) + causal mask) v`.

    References:
        Dao, 2023, "FlashAttention-2", https://arxiv.org/abs/2307.08691.
    """
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def choose(kind: AttentionKind, dtype: Any, width: int, is_plain: bool) -> bool:
    """Whether cuDNN computes the attention of heads of this width.

    Args:
        is_plain: the whole sequence in one call, without a mask or segments.

    Raises:
        NotImplementedError: "cudnn" by name where it does not run, and why.
    """
    if kind == "xla":
        return False
    device = ops.default_device()
    capability = str(getattr(device, "compute_capability", ""))
    reason = unsupported_reason(device.platform, capability, dtype, width, is_plain)
    if kind == "cudnn" and reason:
        raise NotImplementedError(f"attention='cudnn': {reason}")
    return reason is None


def unsupported_reason(
    platform: str, capability: str, dtype: Any, width: int, is_plain: bool
) -> str | None:
    """Why cuDNN does not compute an attention; None where it does."""
    major = capability.split(".")[0]
    if platform != "gpu" or not major.isdigit():
        return f"cuDNN needs a CUDA GPU. This is {platform} {capability}".rstrip() + "."
    if int(major) < 8:
        return f"its attention needs compute capability 8.0. This is {capability}."
    if dtype not in DTYPES:
        return f"its attention takes bfloat16 and float16. Got {jnp.dtype(dtype).name}."
    most = MOST_WIDTH.get(int(major), MOST_WIDTH_LATER)
    if width % 8 or width > most:
        return f"heads must be a multiple of 8 wide, at most {most}. Got {width}."
    if not is_plain:
        return "it takes no mask and no segments here."
    return None
