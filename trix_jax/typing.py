"""The dimension letters and array aliases: the only place where they are defined.

======  ==============================================================
Letter  Meaning
======  ==============================================================
B       batch
L       sequence length
T       tokens, ``B * L``
D       model width
F       hidden width of one tile
N       tiles
C       clusters
K       tiles chosen per token (``tiles_per_token``)
H       attention heads
E       width of one head
V       vocabulary
I, O    input and output features of a single matrix
G       groups of weights along the contraction that share a scale
A       assignments, ``T * K``
M       blocks of tile-sorted rows, R rows in each
======  ==============================================================

In a signature the letters are types, ``x: Float[Array, "*B D"]``; inside a body that
juggles several shapes they are a suffix of the name, ``scores_TN``.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key, Shaped, UInt8

Scalar = Float[Array, ""] | float
Dtype = Any
Variables = Mapping[str, Any]
AnyArray = Array | np.ndarray  # what a module's call takes, of any real type
AxisName = str | tuple[str, ...]  # mapped axes, as jax.lax.psum takes them

__all__ = [
    "AnyArray",
    "Array",
    "AxisName",
    "Bool",
    "Dtype",
    "Float",
    "Int",
    "Integer",
    "Key",
    "Scalar",
    "Shaped",
    "UInt8",
    "Variables",
]
