"""`y = (x @ q) * scale`: a dense matmul on 2-bit weights."""

from trix_kernels.ternary_matmul.api import ternary_matmul as ternary_matmul
