"""Activations, between the two matrices of an FFN, by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from trix_jax.typing import Array, Float


def squared_relu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Computes `max(x, 0)^2` (So et al., 2021, "Primer",
    https://arxiv.org/abs/2109.08668).
    """
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable] = {
    "relu2": squared_relu,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "silu": jax.nn.silu,
}


def activation(name: str) -> Callable:
    """Looks an activation up.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}. Got {name!r}."
        )
    return ACTIVATIONS[name]
