"""`y[m] = x[m] @ w[n]` of blocks of rows, a tile a block, and both of its gradients."""

from trix_kernels.grouped_matmul.api import device_reason as device_reason
from trix_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from trix_kernels.grouped_matmul.api import grouped_outer as grouped_outer
from trix_kernels.grouped_matmul.api import transposed_matmul as transposed_matmul
from trix_kernels.grouped_matmul.api import unsupported_reason as unsupported_reason
