"""Cross-entropy that never holds all logits.

    loss_t = log sum_v exp(x_t . head_v) - x_t . head_label(t)

Logits are made of a part of the tokens at a time, used, and made again in the backward
pass. The gradient of the head is summed over the parts in the head's own dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp

from trix_jax.nn.transformer import TransformerConfig
from trix_jax.typing import Array, Float, Integer

# At a time: 256 MiB of float32. A step of 16,384 tokens and 32,768 ids has eight parts,
# each of enough tokens for a product at full speed; one that has fewer logits is whole.
LOGITS = 2**26


def head_weights(params: Any, config: TransformerConfig) -> Float[Array, "V D"]:
    """The head of a model with these `"params"`: `logits = hidden @ head.T`, in the
    model's dtype.
    """
    return params["embed"]["embedding"] if config.tied else params["head"]["kernel"].T


def cross_entropy(
    x: Float[Array, "B L D"], head: Float[Array, "V D"], labels: Integer[Array, "B L"]
) -> Float[Array, "B L"]:
    """The loss of every token in nats, float32; NaN where the label is no id. Logits are
    rounded to the dtype of `x`, as the model's are.
    """

    def losses(part):
        x, labels = part
        logits = _logits(x, head.astype(x.dtype).T).astype(jnp.float32)
        # The label's by a masked sum: a gather's gradient writes all logits once more.
        labels = labels.astype(jnp.int32)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, labels.ndim)
        own = jnp.sum(jnp.where(ids == labels[..., None], logits, 0), axis=-1)
        is_id = (labels >= 0) & (labels < head.shape[0])
        return jax.nn.logsumexp(logits, axis=-1) - jnp.where(is_id, own, jnp.nan)

    count, size = parts_of(labels.size, head.shape[0])
    if count == 1:
        return losses((x, labels))
    # The last part is filled up with tokens whose losses are dropped.
    more = count * size - labels.size
    x_TD = jnp.pad(x.reshape(labels.size, -1), ((0, more), (0, 0)))
    cut = x_TD.reshape(count, size, -1), jnp.pad(labels.ravel(), (0, more))
    found = jax.lax.map(jax.checkpoint(losses), (cut[0], cut[1].reshape(count, size)))
    return found.ravel()[: labels.size].reshape(labels.shape)


@jax.custom_vjp
def _logits(x: Float[Array, "*B D"], head: Float[Array, "D V"]) -> Float[Array, "*B V"]:
    """`x @ head`. Its gradient for the head is `x.T @ g`, which transposes `x`: what
    JAX derives is `(g.T @ x).T`, and on a CPU transposing all logits, an exponential in
    each, takes longer than the product itself.
    """
    return jnp.dot(x, head)


def _logits_forward(x, head):
    return _logits(x, head), (x, head)


def _logits_backward(inputs, g):
    x, head = inputs
    rows, g_rows = (a.reshape(-1, a.shape[-1]) for a in (x, g))
    return jnp.dot(g, head.T), jnp.dot(rows.T, g_rows)


_logits.defvjp(_logits_forward, _logits_backward)


def parts_of(tokens: int, vocabulary: int) -> tuple[int, int]:
    """The fewest parts that have at most `LOGITS` logits each, or a token; and the tokens
    of one, all but the last full.
    """
    size = max(1, -(-tokens // -(-tokens * vocabulary // LOGITS)))
    return -(-tokens // size), size
