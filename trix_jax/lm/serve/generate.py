"""Sampling from a language model with a key-value cache, on the device."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from trix_jax.lm.serve import decode
from trix_jax.lm.serve.sampling import SamplingConfig as SamplingConfig
from trix_jax.lm.serve.sampling import cut as cut
from trix_jax.lm.serve.sampling import sample as sample
from trix_jax.nn.transformer import TransformerLM
from trix_jax.typing import Integer, Variables

DEFAULT = SamplingConfig()
STREAM = 16  # tokens that come back together where somebody reads along


def generate(
    model: TransformerLM,
    variables: Variables,
    prompt: Integer[np.ndarray, " L"],
    new_tokens: int,
    config: SamplingConfig = DEFAULT,
    end_token: int | None = None,
) -> Iterator[int]:
    """Yields `new_tokens` tokens that follow the prompt, 16 at a time after the first.

    The prompt is read in one call, then tokens follow in a loop on the device. When the
    context is full, the last half of it is read again and generation goes on: a token
    then sees between half a context and a whole one of what came before it.

    Args:
        prompt: token ids, at least one; of a prompt longer than the context the end is
            used.
        end_token: the id after which no more follow, itself the last; None: none.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, a negative
            `new_tokens`.
    """
    prompt = np.asarray(prompt)
    _check(model, "prompt", prompt, new_tokens)
    blocks = _blocks(model, variables, [prompt], new_tokens, config, end_token, STREAM)
    return (token for (row,) in blocks for token in row)


def generate_batch(
    model: TransformerLM,
    variables: Variables,
    prompts: Sequence[Integer[np.ndarray, " _"]],
    new_tokens: int,
    config: SamplingConfig = DEFAULT,
    end_token: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each of several prompts, all together in one loop on the
    device: up to `new_tokens` of each, fewer where its end mark came.

    Sequence r is drawn with `seed + r`, and is what `generate` gives for its prompt with
    that seed, up to rounding (the batch changes the order of sums in matmuls), until the
    longest sequence fills the context. Then the last half context of each is read again,
    and from there on the shorter ones, which have room left, go another way than alone.

    Args:
        prompts: token ids, of any lengths; see `generate`.
        end_token: the id that ends a sequence, itself the last; None: none.

    Raises:
        ValueError: no prompt, or one that `generate` refuses.
    """
    if not len(prompts):
        raise ValueError("prompts must have at least one prompt. Got none.")
    prompts = [np.asarray(prompt) for prompt in prompts]
    for i, prompt in enumerate(prompts):
        _check(model, f"prompts[{i}]", prompt, new_tokens)
    found: list[list[int]] = [[] for _ in prompts]
    many = model.config.context
    for rows in _blocks(model, variables, prompts, new_tokens, config, end_token, many):
        for text, row in zip(found, rows, strict=True):
            text += row
    return found


def _check(
    model: TransformerLM, name: str, prompt: np.ndarray, new_tokens: int
) -> None:
    vocabulary = model.config.vocab_size or 0
    if prompt.size == 0:
        raise ValueError(f"{name} must have at least one token. Got none.")
    if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"{name} must be integer ids, [length]. Got {prompt.dtype} of shape "
            f"{prompt.shape}."
        )
    if new_tokens < 0:
        raise ValueError(f"new_tokens must not be negative. Got {new_tokens}.")
    if prompt.min() < 0 or prompt.max() >= vocabulary:
        raise ValueError(
            f"{name} ids must be in 0..{vocabulary - 1}. Got {prompt.min()}..{prompt.max()}."
        )


def _blocks(
    model: TransformerLM,
    variables: Variables,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    config: SamplingConfig,
    end_token: int | None,
    most: int,
) -> Iterator[list[list[int]]]:
    """Yields the tokens that follow each prompt, up to `most` of each at a time."""
    context, texts = model.config.context, [prompt.tolist() for prompt in prompts]
    steps = decode.compiled(model.config, dataclasses.replace(config, seed=0))
    variables = jax.device_put(variables)
    draws = decode.begin(config.seed, len(texts), end_token)
    decoding, used, done, is_over = None, 0, 0, False
    while done < new_tokens and not is_over:
        if decoding is None or used == context:
            seen = context if decoding is None else max(1, context // 2)
            tokens, mask, used = decode.lined_up(texts, seen, context)
            how = variables, tokens, mask, np.int32(used), draws
            decoding, new = steps.read(*how)
            done += 1
        else:
            count = min(most, context - used, new_tokens - done)
            decoding, new = steps.write(variables, decoding, np.int32(count))
            used, done = used + count, done + count
        draws = decoding.draws
        found, ended = jax.device_get((new, draws.ended))
        rows = [row[row != decode.NOTHING].tolist() for row in found]
        texts = [text + row for text, row in zip(texts, rows, strict=True)]
        is_over = ended.all()
        yield rows
