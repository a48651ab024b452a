"""Kernels on 2-bit packed ternary weights. This package imports nothing of `trix_jax`."""

from trix_kernels import packing as packing
