"""Ternary, sparse, router-free feed-forward layers for JAX: "don't learn what you can
read".

>>> import jax
>>> from trix_jax import HierarchicalTriXFFN
>>> x = jax.random.normal(jax.random.key(0), (2, 128, 512))
>>> ffn = HierarchicalTriXFFN(d_model=512, num_tiles=16, tiles_per_cluster=4)
>>> variables = ffn.init(jax.random.key(1), x)
>>> output, routing_info, aux_losses = ffn.apply(variables, x)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trix_jax import routing as routing
    from trix_jax.frozen import freeze as freeze
    from trix_jax.frozen import widen as widen
    from trix_jax.labels import optimizer_labels as optimizer_labels
    from trix_jax.made_once import ternary_once as ternary_once
    from trix_jax.nn import HierarchicalTriXBlock as HierarchicalTriXBlock
    from trix_jax.nn import HierarchicalTriXFFN as HierarchicalTriXFFN
    from trix_jax.nn import SparseLookupBlock as SparseLookupBlock
    from trix_jax.nn import SparseLookupFFN as SparseLookupFFN
    from trix_jax.nn import SparseTriXBlock as SparseTriXBlock
    from trix_jax.nn import SparseTriXFFN as SparseTriXFFN
    from trix_jax.nn import TransformerConfig as TransformerConfig
    from trix_jax.nn import TransformerLM as TransformerLM
    from trix_jax.nn import TriXLinear as TriXLinear
    from trix_jax.nn import tabulate_routes as tabulate_routes
    from trix_jax.routing import RoutingConfig as RoutingConfig
    from trix_jax.ternary import TernaryConfig as TernaryConfig

__version__ = "0.1.0"
# What is imported when it is asked for: the command line says what it can without JAX.
_NN = "HierarchicalTriXBlock HierarchicalTriXFFN SparseLookupBlock SparseLookupFFN SparseTriXBlock SparseTriXFFN TransformerConfig TransformerLM TriXLinear tabulate_routes"
_HOMES = dict.fromkeys(_NN.split(), "trix_jax.nn") | {
    "freeze": "trix_jax.frozen",
    "widen": "trix_jax.frozen",
    "optimizer_labels": "trix_jax.labels",
    "ternary_once": "trix_jax.made_once",
    "RoutingConfig": "trix_jax.routing",
    "TernaryConfig": "trix_jax.ternary",
}
_MODULES = "balance clusters dispatch expert_parallel frozen hashing labels made_once matching nn ops routing routing_state ternary typing".split()
__all__ = sorted([*_HOMES, "load_run", "routing"])


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"trix_jax.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


def load_run(*args, **kwargs):
    """Restores a trained run: `(model, variables, tokenizer)`. See
    `trix_jax.lm.serve.load.load_run`; needs the `lm` extra.
    """
    from trix_jax.lm.serve.load import load_run as load

    return load(*args, **kwargs)
