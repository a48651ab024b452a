"""`freeze`: trained variables to packed variables, for the same module.

A module takes part by having a method `pack_ternary(params, packed) -> dict`. It is
given its own parameters, which then leave `"params"`, and what the modules inside it
have packed; what it returns are its variables in the collection `"packed"`, where its
`__call__` looks before it looks for parameters.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.core import FrozenDict, unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from trix_jax.ops import PACKED, in_bytes
from trix_jax.ternary import TERNARY, TernaryConfig
from trix_jax.typing import Variables

Path = tuple[str, ...]
PACK = "pack_ternary"  # no name that a model of one's own has for something else
SOFT = (
    "freeze of TernaryConfig(mode='soft'): training ends between the ternary values, and "
    "frozen weights are ternary, so that outputs change. 'progressive' ends ternary."
)


def freeze(
    model: nn.Module, variables: Variables, *args: Any, **kwargs: Any
) -> dict[str, Any] | FrozenDict:
    """Replaces every ternary kernel by its two-bit form, for `model.apply` to use as it
    is.

    Works on any model that holds TriX layers. The latent weights leave `"params"`; the
    packed ones and their bfloat16 scales come in a collection `"packed"`. In float32
    the outputs are equal bit for bit to those of a model that trained to the end, but
    for mode "soft", whose weights are never ternary in training: that is warned of. What
    the packed weights multiply is the module's `TernaryConfig.activations`, which may
    be changed after training. It packs the parameters as they lie in `variables`: merge
    what `nn.map_variables` or `nn.WeightNorm` would add to them on the way (LoRA) first.

    Args:
        model: the module that `variables` belong to.
        variables: with `"params"`, and `"routing"` where there is one. Boxes
            (`nn.with_partitioning`) stay around what stays. Around what is packed they
            keep the names of the axes before the matrices, such as the tiles', and have
            None for the last two. A `FrozenDict` comes back as one.
        *args: one example call's arguments, as for `init`; only their shapes matter, so
            that a `jax.ShapeDtypeStruct` does.
        **kwargs: the same.

    Raises:
        ValueError: no ternary weights found, or they are frozen already, or all are of
            mode "none", whose real weights stay beside others that are packed; no
            `"params"`, or not the model's; a weight that is NaN or infinite, where values
            are known.
    """
    if "params" not in variables:
        raise ValueError(
            f"variables must hold 'params', as `init` returns them. Got {sorted(variables)}."
        )
    if PACKED in variables:
        raise ValueError(
            "variables hold a 'packed' collection: they are frozen already."
        )
    params = flatten_dict(unfreeze(variables["params"]))
    packed: dict[Path, Any] = {}
    modules = modules_with(PACK, model, variables, args, kwargs)
    if not modules:
        raise ValueError(
            f"{type(model).__name__} holds no ternary weights: there is nothing to freeze."
        )
    modes = {
        path: module.config.mode
        for path, module in modules.items()
        if isinstance(getattr(module, "config", None), TernaryConfig)
    }
    if set(modes.values()) == {"none"}:
        raise ValueError(
            "mode='none' keeps real weights: there is nothing ternary to freeze."
        )
    if "soft" in modes.values():
        warnings.warn(SOFT, stacklevel=2)
    for path, module in sorted(modules.items(), key=lambda item: -len(item[0])):
        if modes.get(path) == "none":
            continue
        own = {key[-1]: params.pop(key) for key in list(params) if key[:-1] == path}
        inside = {
            k[len(path) :]: v for k, v in packed.items() if k[: len(path)] == path
        }
        if not own and not inside:  # around kernels of mode "none"
            continue
        new = getattr(module, PACK)(nn.unbox(own), nn.unbox(unflatten_dict(inside)))
        box = own.get("kernel")
        packed |= {(*path, name): _boxed(value, box) for name, value in new.items()}
    frozen = {"params": unflatten_dict(params), PACKED: unflatten_dict(packed)}
    new = {**variables, **frozen}
    new.pop(TERNARY, None)
    return FrozenDict(new) if isinstance(variables, FrozenDict) else new


def widen(variables: Variables) -> dict[str, Any] | FrozenDict:
    """Frozen variables with a byte a ternary weight in place of two bits: the same
    outputs, four times the memory of the tiles, and on a CPU faster calls of few tokens,
    whose time is spent on unpacking.

    For serving: exports hold two bits a weight either way.

    Args:
        variables: as `freeze` or an export gives them; of a boxed kernel the box stays.

    Raises:
        ValueError: nothing is packed; weights are packed for a GPU's kernels.
    """
    if PACKED not in variables:
        raise ValueError(
            "variables must hold a 'packed' collection: freeze the model first. "
            f"Got {sorted(variables)}."
        )

    def wider(path, leaf):
        return in_bytes(leaf) if any(_name(part) == "bits" for part in path) else leaf

    packed = jax.tree_util.tree_map_with_path(wider, unfreeze(variables[PACKED]))
    new = {**variables, PACKED: packed}
    return FrozenDict(new) if isinstance(variables, FrozenDict) else new


def _name(part: Any) -> str:
    return str(getattr(part, "key", ""))


def _boxed(packed, kernel):
    """Packed words or scales in a box like their kernel's. The axes before the matrices,
    such as that of the tiles, are the kernel's and keep their names. The last two are
    not: words are dealt out as a matmul wants them, so a part is no part of the matrix.
    """
    if not isinstance(kernel, nn.Partitioned):
        return packed
    lead = packed.ndim - 2
    names = (*kernel.names, *[None] * lead)[:lead]
    return kernel.replace(value=packed, names=(*names, None, None))


def modules_with(method: str, model, variables, args, kwargs) -> dict[Path, Any]:
    """Every module that has this method, by its path; found by tracing one call."""
    found, called = {}, set()

    def note(call, call_args, call_kwargs, context):
        called.add(context.module.path)
        if context.method_name == "__call__" and hasattr(context.module, method):
            found[context.module.path] = context.module
        return call(*call_args, **call_kwargs)

    def look():
        with nn.intercept_methods(note), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is computed, least of all trained
            trace(model.apply, variables, args, kwargs)

    look()
    params = flatten_dict(unfreeze(variables["params"]))
    if not {path[:-1] for path in params} <= called:
        with jax.disable_jit():  # `nn.jit` traces the first of equal modules alone
            look()
    return found


def trace(
    function: Callable[..., Any],
    tree: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Traces `function(tree, *args, **kwargs)`, of which `args` and `kwargs` may be
    shapes; flags and numbers among them stay what they are.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    shapes = {
        i: leaf
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, jax.ShapeDtypeStruct)
    }

    def run(tree, arrays):
        given = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, kwargs = treedef.unflatten(given)
        return function(tree, *args, **kwargs)

    jax.eval_shape(run, tree, shapes)
