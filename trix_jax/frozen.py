"""`freeze`: trained variables to packed variables, for the same module.

A module takes part by having a method `pack(params, packed) -> dict`. It is given its
own parameters, which then leave `"params"`, and what the modules inside it have packed;
what it returns are its variables in the collection `"packed"`, where its `__call__`
looks before it looks for parameters.
"""

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from trix_jax.ops import PACKED
from trix_jax.typing import Variables

Path = tuple[str, ...]


def freeze(model: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> dict:
    """Replaces every ternary kernel by its two-bit form, for `model.apply` to use as it
    is.

    Works on any model that holds TriX layers. The latent weights leave `"params"`; the
    packed ones and their bfloat16 scales come in a collection `"packed"`. In float32
    the outputs are equal bit for bit to those of a model that trained to the end. What
    the packed weights multiply is the module's `TernaryConfig.activations`, which may
    be changed after training.

    Args:
        model: the module that `variables` belong to.
        variables: with `"params"`, and `"routing"` where there is one.
        *args: one example call's arguments, as for `init`; only their shapes matter.
        **kwargs: the same.

    Raises:
        ValueError: no ternary weights found, or they are frozen already, or a layer of
            mode "none" keeps real weights.
    """
    if PACKED in variables:
        raise ValueError(
            "variables hold a 'packed' collection: they are frozen already."
        )
    params = flatten_dict(variables["params"])
    packed: dict[Path, Any] = {}
    modules = _packing_modules(model, variables, args, kwargs)
    for path, module in sorted(modules.items(), key=lambda item: -len(item[0])):
        own = {key[-1]: params.pop(key) for key in list(params) if key[:-1] == path}
        inside = {
            k[len(path) :]: v for k, v in packed.items() if k[: len(path)] == path
        }
        new = module.pack(own, unflatten_dict(inside))
        packed |= {(*path, name): value for name, value in new.items()}
    frozen = {"params": unflatten_dict(params), PACKED: unflatten_dict(packed)}
    return {**variables, **frozen}


def _packing_modules(model, variables, args, kwargs) -> dict[Path, Any]:
    """Every module that packs something, by its path; found by tracing one call."""
    found = {}

    def note(call, call_args, call_kwargs, context):
        if context.method_name == "__call__" and hasattr(context.module, "pack"):
            found[context.module.path] = context.module
        return call(*call_args, **call_kwargs)

    def run(variables):
        with nn.intercept_methods(note):
            return model.apply(variables, *args, **kwargs)

    jax.eval_shape(run, variables)
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no ternary weights: there is nothing to freeze."
        )
    return found
