"""The oracle of `tile_ffn`: plain numpy on unpacked weights."""

import numpy as np

from trix_kernels.tile_matmul.reference import tile_matmul, tile_matmul_int8


def tile_ffn(x, up: tuple, down: tuple, block_tile, act):
    """Computes `act(x[m] @ up[n]) @ down[n]`, `n = block_tile[m]`, in float64.

    `up` and `down` are pairs of unpacked weights and scales.
    """
    hidden = np.float64(act(tile_matmul(x, up[0], up[1], block_tile)))
    return tile_matmul(hidden, down[0], down[1], block_tile)


def tile_ffn_int8(x, up: tuple, down: tuple, block_tile, act):
    """Computes the same with eight-bit activations in both products.

    `x` is an array in the dtype that the hidden layer is rounded to.
    """
    hidden = tile_matmul_int8(x, up[0], up[1], block_tile).astype(x.dtype)
    return tile_matmul_int8(np.asarray(act(hidden)), down[0], down[1], block_tile)
