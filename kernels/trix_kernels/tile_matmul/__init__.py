"""`y[a] = (x[a] @ q[n]) * scale[n]`: the matmul of rows sorted by tile."""

from trix_kernels.tile_matmul.api import block_matmul as block_matmul
from trix_kernels.tile_matmul.api import tile_matmul as tile_matmul
from trix_kernels.tile_matmul.api import unsupported_reason as unsupported_reason
