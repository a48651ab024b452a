"""Kernels on 2-bit packed ternary weights, and on whole ones, as in training.

This package imports nothing of `trix_jax`.
"""

from trix_kernels import device as device
from trix_kernels import packing as packing
from trix_kernels.grouped_matmul import grouped_matmul as grouped_matmul
from trix_kernels.grouped_matmul import grouped_outer as grouped_outer
from trix_kernels.grouped_matmul import transposed_matmul as transposed_matmul
from trix_kernels.quantize import Activations as Activations
from trix_kernels.ternary_matmul import ternary_matmul as ternary_matmul
from trix_kernels.tile_ffn import block_ffn as block_ffn
from trix_kernels.tile_matmul import block_matmul as block_matmul
from trix_kernels.tile_matmul import tile_matmul as tile_matmul
from trix_kernels.weights import Packed as Packed
from trix_kernels.weights import pack as pack
from trix_kernels.weights import unpack as unpack
