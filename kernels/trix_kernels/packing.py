"""The interchange format of ternary weights: two bits each, four to a byte. What files
hold.

    byte[..., j] = sum over i in 0..3 of code(q[..., 4 j + i]) << 2 i
    code(0) = 00,  code(+1) = 01,  code(-1) = 10,  11 is not a weight

Rows, the last axis, start on a byte: a row of `n` weights takes `ceil(n / 4)` bytes and
the unused bits of its last byte are zero. In files a row is one output's weights along
the contraction, `[..., out, in]`, which makes the bytes equal to those of the PyTorch
original's `pack_weights`. The functions take numpy arrays on the host and jax arrays,
under `jit` included, and return the same kind.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Integer, Num, UInt8

FORMAT_NAME = "trix-ternary-2bit"
FORMAT_VERSION = 1
_SHIFTS = (0, 2, 4, 6)

Words = UInt8[Array, "*B bytes"] | UInt8[np.ndarray, "*B bytes"]


def packed_length(n: int) -> int:
    """Bytes in a row of `n` weights, `ceil(n / 4)`."""
    return -(-n // 4)


def pack(q: Num[Array, "*B n"] | Num[np.ndarray, "*B n"]) -> Words:
    """Computes `byte[j] = code(q[4j]) | code(q[4j+1]) << 2 | code(q[4j+2]) << 4 |
    code(q[4j+3]) << 6`.

    Args:
        q: weights, each exactly -1, 0 or +1, of any real dtype.

    Returns:
        `uint8[..., ceil(n / 4)]`.

    Raises:
        ValueError: a numpy `q` holds another value. (A jax array may be traced and is
            not looked at: there the sign is what is stored.)
    """
    xp = np if isinstance(q, np.ndarray) else jnp
    if q.ndim == 0:
        raise ValueError("q must have at least one axis to pack along. Got a scalar.")
    if isinstance(q, np.ndarray) and not np.isin(q, (-1, 0, 1)).all():
        bad = q[~np.isin(q, (-1, 0, 1))][0]
        raise ValueError(f"q must hold only -1, 0 and +1. Got {bad!r}.")
    n = q.shape[-1]
    codes = (
        (q > 0).astype(xp.uint8) | ((q < 0).astype(xp.uint8) << xp.uint8(1))
    ).astype(xp.uint8)
    pad = 4 * packed_length(n) - n
    codes = xp.pad(codes, [(0, 0)] * (q.ndim - 1) + [(0, pad)])
    quads = codes.reshape(*q.shape[:-1], packed_length(n), 4)
    words = quads[..., 0]
    for i in (1, 2, 3):
        words = words | (quads[..., i] << xp.uint8(_SHIFTS[i]))
    return words


def unpack(
    words: Words, n: int, dtype=np.int8
) -> Integer[Array, "*B n"] | Num[Array, "*B n"] | Num[np.ndarray, "*B n"]:
    """Computes `q[4j + i] = (c & 1) - (c >> 1)` with `c = byte[j] >> 2i & 3`, the
    inverse of `pack`.

    Args:
        words: bytes from `pack`.
        n: weights in a row; `ceil(n / 4)` must be the length of the last axis.
        dtype: of the result, -1, 0 and +1 being exact in all of them.

    Raises:
        ValueError: `n` does not fit the row length.
    """
    xp = np if isinstance(words, np.ndarray) else jnp
    if words.shape[-1] != packed_length(n):
        raise ValueError(
            f"n={n} weights take rows of {packed_length(n)} bytes. Got rows of {words.shape[-1]}."
        )
    shifts = np.asarray(_SHIFTS, np.uint8).reshape(*[1] * words.ndim, 4)
    codes = (words[..., None] >> shifts) & xp.uint8(3)
    values = (codes & xp.uint8(1)).astype(xp.int8) - (codes >> xp.uint8(1)).astype(
        xp.int8
    )
    return values.reshape(*words.shape[:-1], 4 * words.shape[-1])[..., :n].astype(dtype)


def check(words: UInt8[np.ndarray, "*B bytes"], n: int) -> None:
    """Refuses bytes that no `pack` wrote: the code 11, or set bits behind the last
    weight of a row.

    Raises:
        ValueError: naming the first offending byte.
    """
    if words.dtype != np.uint8 or words.ndim == 0:
        raise ValueError(
            f"words must be uint8 with at least one axis. Got {words.dtype}{list(words.shape)}."
        )
    if words.shape[-1] != packed_length(n):
        raise ValueError(
            f"n={n} weights take rows of {packed_length(n)} bytes. Got rows of {words.shape[-1]}."
        )
    both = words & (words >> 1) & 0b01010101
    if both.any():
        where = tuple(int(i) for i in np.argwhere(both)[0])
        raise ValueError(
            f"words must not hold the code 11. Got byte {int(words[where]):#010b} at {where}."
        )
    used = n % 4
    if n and used and (words[..., -1] >> (2 * used)).any():
        raise ValueError(
            f"words must be zero behind weight {n} of a row. Got set bits in the last byte of one."
        )
