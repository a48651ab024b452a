"""How the next token is chosen."""

import dataclasses

import jax
import jax.numpy as jnp

from trix_jax.typing import Array, Float, Integer


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together have at least this probability
            (Holtzman et al., 2019, https://arxiv.org/abs/1904.09751).
        seed: the same seed gives the same text; 0 to 2**32 - 1.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature must be finite and not negative. Got {self.temperature}."
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative. Got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1. Got {self.top_p}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..2**32 - 1. Got {self.seed}.")


def sample(
    logits: Float[Array, "B V"], key: jax.Array, config: SamplingConfig
) -> Integer[Array, " B"]:
    """Draws a token from `softmax(cut(logits, config))`, or takes the likeliest at
    temperature 0.
    """
    if config.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(key, cut(logits, config), axis=-1)


def cut(logits: Float[Array, "B V"], config: SamplingConfig) -> Float[Array, "B V"]:
    """Computes `(logits - max(logits)) / temperature`, with -inf for what `top_k` and
    `top_p` leave out: of equal logits the later ids.

    The greatest is taken off first, so that no temperature, however small, overflows.
    """
    temperature = max(config.temperature, float(jnp.finfo(jnp.float32).tiny))
    logits = logits.astype(jnp.float32)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if config.top_k == 0 and config.top_p == 1:
        return logits
    rank = jnp.argsort(order, axis=-1)
    kept = jnp.arange(logits.shape[-1])[None] < (config.top_k or logits.shape[-1])
    ordered = jnp.where(kept, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    kept &= before < config.top_p if config.top_p < 1 else True
    return jnp.where(jnp.take_along_axis(kept, rank, axis=-1), logits, -jnp.inf)
