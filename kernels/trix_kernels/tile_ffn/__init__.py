"""`y = act(x @ up[n]) @ down[n]`: a tile's two matmuls."""

from trix_kernels.tile_ffn.api import block_ffn as block_ffn
