"""`ternary_once`: the ternary weights of a step, made once for all its micro-batches.

A module takes part by having a method `ternary_once(params, progress) -> dict`: what its
`__call__` finds in the collection `"ternary"` and takes in place of making it.
"""

from typing import Any

from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from trix_jax.frozen import modules_with
from trix_jax.ops import PACKED
from trix_jax.ternary import TERNARY
from trix_jax.typing import Scalar, Variables


def ternary_once(
    model: nn.Module,
    variables: Variables,
    *args: Any,
    progress: Scalar | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    """Makes the ternary weights of `variables`, for calls that differ in their tokens
    alone: `{"ternary": ...}`, to be given to `apply` beside `"params"`.

    For accumulated gradients: a loop over micro-batches makes them in every pass, unless
    the compiler moves that out (XLA does on a CPU and does not on a GPU). Outputs and
    gradients are those without it; the latent weights stay in `"params"`, take the
    gradient, and are not read on the way forward. It costs a byte a weight, or four where
    `full_precision_fraction` keeps weights real for a while. Modes "none", "soft" and
    "progressive" have nothing that could be made once; their weights are made as ever.

    It belongs to these parameters: make it anew after every update. What
    `nn.map_variables` adds to them on the way is not in it.

    Args:
        model: the module that `variables` belong to.
        variables: with `"params"`, whole or as they lie in a `shard_map`.
        *args: one example call's arguments, without `train`, as for `init`; only their
            shapes matter.
        progress: share of training done, the same as in the calls; 1 where they are an
            evaluation. Only `full_precision_fraction` asks for it.
        **kwargs: as `args`.

    Raises:
        ValueError: there are no `"params"`, or the weights are frozen; no `progress`
            where weights stay real for a while.
    """
    if "params" not in variables:
        raise ValueError(
            f"variables must hold 'params', as `init` returns them. Got {sorted(variables)}."
        )
    if PACKED in variables:
        raise ValueError(
            "variables hold a 'packed' collection: their weights are made already."
        )
    params = flatten_dict(unfreeze(variables["params"]))
    found = {}
    modules = modules_with("ternary_once", model, variables, args, kwargs)
    for path, module in modules.items():
        own = {key[-1]: leaf for key, leaf in params.items() if key[:-1] == path}
        made = module.ternary_once(nn.unbox(own), progress)
        found |= {(*path, name): value for name, value in made.items()}
    return {TERNARY: unflatten_dict(found)} if found else {}
