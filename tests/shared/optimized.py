"""`jit` as users have it. Tests compile without optimization (`conftest.py`); that two
programs give the same bits is worth more where the compiler may fuse and reorder.
"""

import functools

import jax

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
