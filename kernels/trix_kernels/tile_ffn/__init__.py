"""`y = act(x @ up[n]) @ down[n]`: a tile's two matmuls in one kernel."""

from trix_kernels.tile_ffn.api import block_ffn as block_ffn
from trix_kernels.tile_ffn.api import unsupported_reason as unsupported_reason
