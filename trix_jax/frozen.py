"""`freeze`: trained variables to packed variables, for the same module."""

from typing import Any

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from trix_jax.nn.kernel import PACKED, TernaryKernel
from trix_jax.nn.tiles import RoutedTiles
from trix_jax.typing import Variables


def freeze(model: nn.Module, variables: Variables, *args: Any, **kwargs: Any) -> dict:
    """Replaces every ternary kernel by its two-bit form: `model.apply(freeze(model, v, x), x)` equals `model.apply(v, x)`.

    Works on any model that holds TriX layers. The latent weights leave `"params"`, the packed ones and their bfloat16
    scales come in a collection `"packed"`, and the module computes from those; nothing else changes. In float32 the
    outputs are equal bit for bit.

    Args:
        model: the module that `variables` belong to.
        variables: with `"params"`, and `"routing"` where there is one.
        *args: one example call's arguments, as for `init`; only their shapes matter.
        **kwargs: the same.

    Raises:
        ValueError: no ternary weights found, or they are frozen already, or a layer of mode "none" keeps real weights.
    """
    if PACKED in variables:
        raise ValueError(
            "variables hold a 'packed' collection: they are frozen already."
        )
    found = _ternary_modules(model, variables, args, kwargs)
    params = flatten_dict(variables["params"])
    packed: dict[tuple[str, ...], Any] = {}
    for path, module in sorted(found.items(), key=lambda item: -len(item[0])):
        if isinstance(module, TernaryKernel):
            own = {
                key[-1]: params.pop(key)
                for key in list(params)
                if key[: len(path)] == path
            }
            packed |= {
                (*path, name): value
                for name, value in module.pack(own)._asdict().items()
            }
        else:
            up = {name: packed[*path, "up", name] for name in ("bits", "scale")}
            packed |= {
                (*path, name): value for name, value in module.pack({"up": up}).items()
            }
    return {
        **variables,
        "params": unflatten_dict(params),
        PACKED: unflatten_dict(packed),
    }


def _ternary_modules(
    model, variables, args, kwargs
) -> dict[tuple[str, ...], TernaryKernel | RoutedTiles]:
    """Every module that packs something, by its path; found by tracing one call."""
    found = {}

    def note(call, call_args, call_kwargs, context):
        module = context.module
        if (
            isinstance(module, TernaryKernel | RoutedTiles)
            and context.method_name == "__call__"
        ):
            if not (
                isinstance(module, TernaryKernel)
                and module.config.mode == "none"
                and not module.learn_scale
            ):
                found[module.path] = module
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
