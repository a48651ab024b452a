"""Derivatives of one's own in every mode, forward and reverse.

    linear_map:     y = forward(fixed, x), linear in x;  dx = transpose(fixed, dy)
    with_backward:  y = function(x, fixed);              dx = backward((x, fixed), dy)
    with_kept:      y, kept = function(x, fixed);        dx = backward((x, fixed, kept), dy)

A gather along a permutation is transposed by the gather along its inverse, where JAX
would scatter; a loop of unknown length by another such loop, where JAX gives up.
`jax.custom_vjp` says so too, but then forward mode is refused. Here it is that of the
function itself, and derivatives of derivatives are those of the bodies.
(`jax.custom_derivatives.linear_call` knows neither `vmap` nor a derivative to `fixed`.)
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Map = Callable[[Any, Any], Any]

_remember = lru_cache(1024)  # one object for one function: JAX traces it once


def with_backward(function: Map, backward: Map) -> Map:
    """`function(x, fixed)` with `backward((x, fixed), dy)` as its gradient to `x`.

    Args:
        function: of two trees of arrays. It closes over none, nor does `backward`.
        backward: returns what is of the structure and the types of `x`.
    """

    def tangent(primals, dx):
        x, fixed = primals
        return jax.jvp(lambda x: function(x, fixed), (x,), (dx,))[1]

    @jax.custom_jvp
    def call(x, fixed):
        return function(x, fixed)

    @call.defjvp
    def _(primals, tangents):
        return call(*primals), linear_map(tangent, backward, primals, tangents[0])

    return call


def with_kept(function: Map, backward: Map) -> Map:
    """The `y` of `y, kept = function(x, fixed)` with `backward((x, fixed, kept), dy)` as
    its gradient to `x`; without a gradient nothing is kept.

    Arguments are those of `with_backward`. Derivatives of derivatives are those that JAX
    has of `function` and `backward`.
    """

    def value(x, fixed):
        return function(x, fixed)[0]

    def tangent(primals, dx):
        x, fixed, _ = primals
        return jax.jvp(lambda x: value(x, fixed), (x,), (dx,))[1]

    call = jax.custom_jvp(value)

    @call.defjvp
    def _(primals, tangents):
        y, kept = function(*primals)
        return y, linear_map(tangent, backward, (*primals, kept), tangents[0])

    return call


def without_derivative(function: Callable, name: str) -> Callable:
    """`function(*arrays)`; to differentiate it raises NotImplementedError.

    Args:
        name: the `implementation` that has no derivative.
    """

    @jax.custom_jvp
    def call(*arrays):
        return function(*arrays)

    @call.defjvp
    def _(primals, tangents):
        raise NotImplementedError(
            f"implementation={name!r} has no derivative, forward or reverse. Say "
            "implementation='xla', or differentiate the weights before they are packed."
        )

    return call


def linear_map(forward: Map, transpose: Map, fixed: Any, x: Any) -> Any:
    """Computes `forward(fixed, x)`, whose transpose is `transpose(fixed, dy)`.

    Args:
        forward: linear in `x`, of two trees of arrays. It closes over none, nor does
            `transpose`.
        transpose: returns what is of the structure and the types of `x`.
        fixed: what both maps need to know.
        x: real arrays.
    """
    fixed_leaves, fixed_tree = jax.tree.flatten(fixed)
    leaves, tree = jax.tree.flatten(x)
    out_tree = jax.tree.structure(jax.eval_shape(forward, fixed, x))
    y = _linear_p.bind(
        *fixed_leaves,
        *leaves,
        forward=_on_leaves(forward, fixed_tree, tree),
        transpose=_on_leaves(transpose, fixed_tree, out_tree),
        count=len(fixed_leaves),
    )
    return jax.tree.unflatten(out_tree, y)


@_remember
def _on_leaves(function, fixed_tree, tree):
    def of_leaves(fixed, leaves):
        y = function(fixed_tree.unflatten(fixed), tree.unflatten(leaves))
        return jax.tree.leaves(y)

    return of_leaves


_linear_p = Primitive("linear_map")
_linear_p.multiple_results = True


def _run(*args, forward, transpose, count):
    del transpose
    return forward(list(args[:count]), list(args[count:]))


def _types(*avals, forward, transpose, count):
    del transpose
    traced = jax.jit(forward).trace(list(avals[:count]), list(avals[count:]))
    return traced.jaxpr.out_avals


def _jvp(primals, tangents, *, forward, transpose, count):
    maps = {"forward": forward, "transpose": transpose, "count": count}
    fixed, x = list(primals[:count]), list(primals[count:])
    dx = [ad.instantiate_zeros(t) for t in tangents[count:]]
    y, dy = _linear_p.bind(*primals, **maps), _linear_p.bind(*fixed, *dx, **maps)
    moving = [i for i in range(count) if not isinstance(tangents[i], ad.Zero)]
    if moving:

        def of_fixed(*values):
            given = dict(zip(moving, values, strict=True))
            return forward([given.get(i, leaf) for i, leaf in enumerate(fixed)], x)

        own = [fixed[i] for i in moving], [tangents[i] for i in moving]
        dy = jax.tree.map(jnp.add, dy, jax.jvp(of_fixed, *own)[1])
    return y, dy


def _transpose(cotangents, *args, forward, transpose, count):
    dy = [ad.instantiate_zeros(t) for t in cotangents]
    swapped = {"forward": transpose, "transpose": forward, "count": count}
    return [None] * count + _linear_p.bind(*args[:count], *dy, **swapped)


def _batch(axis, args, dims, *, forward, transpose, count):
    maps = {"forward": forward, "transpose": transpose, "count": count}
    if all(dim is None for dim in dims):
        y = _linear_p.bind(*args, **maps)
        return y, [None] * len(y)
    x = [
        batching.bdim_at_front(leaf, dim, axis.size, axis.explicit_mesh_axis)
        for leaf, dim in zip(args[count:], dims[count:], strict=True)
    ]
    spmd = axis.spmd_name or axis.explicit_mesh_axis
    how = (tuple(dims[:count]), axis.size, axis.name, spmd)
    maps |= {k: _mapped(maps[k], *how) for k in ("forward", "transpose")}
    y = _linear_p.bind(*args[:count], *x, **maps)
    return y, [0] * len(y)


@_remember
def _mapped(function, dims, size, name, spmd_name):
    return jax.vmap(
        function, (list(dims), 0), 0, name, axis_size=size, spmd_axis_name=spmd_name
    )


_linear_p.def_impl(jax.jit(_run, static_argnames=("forward", "transpose", "count")))
_linear_p.def_abstract_eval(_types)
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.fancy_primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_run, multiple_results=True))
