"""Sampling from a language model with a key-value cache."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.typing import Array, Float, Integer, Variables


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: only the k likeliest tokens; 0 is all.
        top_p: only the likeliest tokens that together have at least this probability
            (Holtzman et al., 2019, https://arxiv.org/abs/1904.09751).
        seed: the same seed gives the same text.
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


def generate(
    model: TransformerLM,
    variables: Variables,
    prompt: Integer[np.ndarray, " L"],
    new_tokens: int,
    config: SamplingConfig = SamplingConfig(),
) -> Iterator[int]:
    """Yields `new_tokens` tokens that follow the prompt.

    The prompt is read in one call, then one token a call. When the context is full, the
    last half of it is read again and generation goes on: a token then sees between half
    a context and a whole one of what came before it.

    Args:
        prompt: token ids, at least one; of a prompt longer than the context the end is
            used.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, a negative
            `new_tokens`.
    """
    prompt = np.asarray(prompt)
    vocabulary = model.config.vocab_size or 0
    if prompt.size == 0:
        raise ValueError("prompt must have at least one token. Got none.")
    if new_tokens < 0:
        raise ValueError(f"new_tokens must not be negative. Got {new_tokens}.")
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(
            f"prompt ids must be in 0..{vocabulary - 1}. Got {prompt.min()}..{prompt.max()}."
        )
    return _generate(model, variables, prompt, new_tokens, config)


def _generate(model, variables, prompt, new_tokens, config) -> Iterator[int]:
    step, context = _compiled(model.config, config), model.config.context
    key = jax.random.key(config.seed)
    text, cache, used = list(map(int, prompt)), {}, 0
    chunk = text[-context:]
    for i in range(new_tokens):
        if used + len(chunk) > context:
            chunk, cache, used = text[-max(1, context // 2) :], {}, 0
        tokens = jnp.asarray(chunk, jnp.int32)[None]
        token, cache = step(variables, cache, tokens, jax.random.fold_in(key, i))
        used += len(chunk)
        chunk = [int(token)]
        text += chunk
        yield chunk[0]


@lru_cache(maxsize=8)
def _compiled(shape: TransformerConfig, config: SamplingConfig) -> Callable:
    """`(variables, cache, tokens, key) -> (token, cache)`, compiled once for a prompt
    and once for a token.
    """
    model = TransformerLM(shape)

    def step(variables: Any, cache: Any, tokens, key):
        (logits, _, _), mutated = model.apply(
            {**variables, **({"cache": cache} if cache else {})},
            tokens,
            decode=True,
            mutable=["cache"],
        )
        return sample(logits[:, -1], key, config)[0], mutated["cache"]

    return jax.jit(step)
