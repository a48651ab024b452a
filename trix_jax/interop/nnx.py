"""TriX layers in a Flax NNX model: `train()` and `eval()`, the routing state, packing.

    self.ffn = Layer(SparseTriXFFN(64), x, rngs=rngs)       in the model's __init__
    y, info, aux = self.ffn(x)                              in its __call__
    update_routing(model)                                   once an optimizer step
    served = freeze(model, x)                               two bits a weight

`Layer` is `flax.nnx.bridge.ToNNX` with a mode. Parameters are `nnx.Param`; the routing
state is of the type `Routing` and packed weights of `PackedWeights`, which no optimizer
of `nnx.Param` sees.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx.bridge import variables as bridge

from trix_jax import frozen, routing
from trix_jax.ops import PACKED

Routing = nnx.variable_type_from_name("routing", allow_register=True)
PackedWeights = nnx.variable_type_from_name(PACKED, allow_register=True)


class Layer(nnx.bridge.ToNNX):
    """A Linen module that takes `train`, as an NNX module with a mode.

    `model.train()` turns dropout on and lets each call add to the routing state, which
    `update_routing` then moves; `model.eval()` does neither. An NNX module starts in
    training, as `nnx.Dropout` does. `train=` in a call goes before the mode.

    Args:
        module: an FFN, a block, or a Linen module of one's own that holds them.
        *sample: example arguments of a call, of which only the shapes matter.
        rngs: for parameters, and "dropout" where there is some.
        **how: example keyword arguments.
    """

    def __init__(
        self, module: nn.Module, *sample: Any, rngs: nnx.Rngs, **how: Any
    ) -> None:
        super().__init__(module, rngs)
        self.to_nnx__deterministic = False
        self.lazy_init(*sample, train=False, **how)

    @property
    def deterministic(self) -> bool:
        """True in evaluation; `train()` and `eval()` set it."""
        return self.to_nnx__deterministic

    @deterministic.setter
    def deterministic(self, value: bool) -> None:
        self.to_nnx__deterministic = value

    def set_view(self, deterministic: bool | None = None) -> None:
        """Class method used by `nnx.view`.

        Args:
          deterministic: True for evaluation.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(self, *args: Any, train: bool | None = None, **how: Any) -> Any:
        """Calls the module in the layer's mode."""
        train = not self.deterministic if train is None else train
        how.setdefault("mutable", ["routing"] if train else False)
        return super().__call__(*args, train=train, **how)


def update_routing(model: nnx.Module, **how: Any) -> None:
    """Moves the routing state of every layer, in place; see `routing.update`."""
    state = nnx.to_pure_dict(nnx.state(model, Routing))
    nnx.update(model, routing.update(state, **how))


def freeze(model: nnx.Module, *args: Any, **how: Any) -> nnx.Module:
    """A copy of the model, in evaluation, whose ternary kernels are in two bits; see
    `trix_jax.freeze`.

    Works on models whose TriX layers are `Layer` or `nnx.bridge.ToNNX`, also where
    `nnx.vmap` made them and `nnx.scan` calls them.

    Args:
        model: stays as it is.
        *args: example arguments of a call, of which only the shapes matter.
        **how: example keyword arguments.

    Raises:
        ValueError: the model holds no ternary weights; a layer that holds some has
            parameters that the call did not see.
    """
    model = nnx.clone(model)
    model.eval()
    calls = _calls_of_packing_modules(model, args, how)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} holds no ternary weights: there is nothing to freeze."
        )
    for _, layer in nnx.iter_modules(model):
        if not isinstance(layer, nnx.bridge.ToNNX):
            continue
        alike = [call for call in calls if _same(call[0], layer.to_nnx__module)]
        if not alike:
            continue
        variables = _variables_of(layer)
        fitting = [call for call in alike if _fits(variables, call[1])]
        if not fitting:
            raise ValueError(
                f"{type(layer.to_nnx__module).__name__} has parameters that no call of "
                "the model saw: give arguments with which it is called."
            )
        _, shapes, given = fitting[0]
        _pack(layer, variables, shapes, *given)
    return model


def _calls_of_packing_modules(model, args, how):
    """Linen modules at the top that hold something to pack, the shapes of their
    parameters and what they are called with; found by tracing a call of the model.
    """
    calls, packing = [], []

    def note(call, call_args, call_kwargs, context):
        module = context.module
        if context.method_name == "__call__":
            if hasattr(module, frozen.PACK):
                packing.append(_top(module))
            if module is _top(module):
                given = jax.tree.map(_shape, (call_args, call_kwargs))
                calls.append((module, _shapes(module.variables), given))
        return call(*call_args, **call_kwargs)

    graph, state = nnx.split(model)

    def run(state, *args, **how):
        return nnx.merge(graph, state)(*args, **how)

    with nn.intercept_methods(note):
        frozen.trace(run, state, args, how)
    return [call for call in calls if any(call[0] is top for top in packing)]


def _shape(leaf):
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def _top(module):
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return module


def _same(one, other) -> bool:
    """Whether two Linen modules have the same class and fields, whatever they are
    bound to.
    """
    if type(one) is not type(other):
        return False
    names = one.__dataclass_fields__.keys() - {"parent", "name"}
    return all(getattr(one, n) == getattr(other, n) for n in names)


def _shapes(variables) -> list[tuple[int, ...]]:
    return [jnp.shape(leaf) for leaf in jax.tree.leaves(variables.get("params", {}))]


def _fits(variables, shapes: list[tuple[int, ...]]) -> bool:
    """Whether parameters are those that a call saw: as many, and of these shapes but for
    axes in front, which a scanned model has outside of a call.
    """
    own = _shapes(variables)
    pairs = zip(own, shapes, strict=False)
    return len(own) == len(shapes) and all(
        len(one) >= len(inner) and one[len(one) - len(inner) :] == inner
        for one, inner in pairs
    )


def _attributes(layer) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(layer).items()
        if not name.startswith(("to_nnx__", "_pytree__"))
    }


def _variables_of(layer) -> dict[str, Any]:
    return bridge.nnx_attrs_to_linen_vars(_attributes(layer))


def _pack(layer, variables, shapes, args, how):
    def pack(variables):
        return frozen.freeze(layer.to_nnx__module, variables, *args, **how)

    stacked = len(_shapes(variables)[0]) - len(shapes[0]) if shapes else 0
    for _ in range(stacked):  # layers that nnx.vmap made
        pack = jax.vmap(pack)
    packed = pack(variables)
    for name in _attributes(layer):
        delattr(layer, name)
    for name, value in bridge.linen_vars_to_nnx_attrs(packed).items():
        setattr(layer, name, nnx.data(value))
