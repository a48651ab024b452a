"""The FFN layers as one registry: every test of `ffn` runs for all of them, and they
share what was compiled.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import HierarchicalTriXFFN, SparseLookupFFN, SparseTriXFFN

# Compiling is what takes the time; no test that uses this asks for equal bits across
# programs.

D = 16
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, D)), jnp.float32)
FFNS = {
    "sparse_top1": SparseTriXFFN(D),
    "sparse_top2": SparseTriXFFN(D, num_tiles=8, tiles_per_token=2),
    "hierarchical": HierarchicalTriXFFN(
        D, num_tiles=8, tiles_per_cluster=2, top_k_clusters=2, tiles_per_token=2
    ),
    "lookup": SparseLookupFFN(D, num_tiles=4, tiles_per_cluster=2, grid_size=3),
    "lookup_own": SparseLookupFFN(
        D,
        num_tiles=12,
        tiles_per_cluster=3,
        grid_size=2,
        top_k_clusters=2,
        tiles_per_token=3,
        reads="own",
    ),
}
TILES = {"tiles/up/kernel", "tiles/down/kernel"}
LEAVES = {
    "sparse_top1": TILES,
    "sparse_top2": TILES,
    "hierarchical": TILES | {"norm/scale", "output_scale"},
    "lookup": {
        "norm/scale",
        "norm/bias",
        "directions",
        "splines/kernel",
        "spline_scale",
        "output_scale",
        "compress_in/kernel",
        "compress_in/bias",
        "compress_out/kernel",
        "compress_out/bias",
    },
    "lookup_own": {
        "norm/scale",
        "norm/bias",
        "tile_read/kernel",
        "tile_write/kernel",
        "splines/kernel",
        "spline_scale",
        "output_scale",
    },
}


class Case:
    """A layer, its variables and what it computes, each compiled once."""

    x = X

    def __init__(self, name):
        self.name, self.layer, self.leaves = name, FFNS[name], LEAVES[name]
        self.traces = collections.Counter()
        self.apply = jax.jit(self._forward)
        self.init = jax.jit(self.layer.init)
        self.variables = functools.cache(self._initialized)
        self.task_gradient = functools.cache(self._task_gradient)

    def run(self, x=X):
        return self.apply(self.variables(), x)

    def _forward(self, variables, x):
        self.traces[x.shape, str(x.dtype)] += 1
        return self.layer.apply(variables, x)

    def _initialized(self, seed=0):
        return self.init(jax.random.key(seed), X)

    def _task_gradient(self, lift=lambda f: f):
        """Gradients of a task loss that sees the output only, and the output."""
        dy = jnp.asarray(np.random.default_rng(1).normal(size=X.shape), jnp.float32)

        def task(params, state):
            y, *_ = self.layer.apply({"params": params, "routing": state}, X)
            return jnp.sum(y * dy), y

        gradient = jax.grad(lift(task), has_aux=True)
        return jax.jit(
            lambda variables: gradient(variables["params"], variables["routing"])
        )


CASES = {name: Case(name) for name in FFNS}
KINDS = ["hierarchical", "sparse_top2", "lookup"]
LATER = ["sparse_top1", "lookup_own"]


@pytest.fixture(
    params=[
        pytest.param(name, marks=[pytest.mark.slow] if name in LATER else [])
        for name in CASES
    ]
)
def ffn(request):
    """Every layer; with the slow tests one tile a token, as a lookup has it too, and the
    lookup whose tiles read by themselves, which `test_lookup_own.py` has by default.
    """
    return CASES[request.param]


@pytest.fixture(
    params=[KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])]
)
def ffn_kind(request):
    """For what takes a compilation of its own: one layer of the default tests, all kinds
    of the slow ones. Without top-1, which cannot differ from top-2 there.
    """
    return CASES[request.param]
