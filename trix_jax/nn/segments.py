"""Which tokens of a line belong together."""

import jax.numpy as jnp
from flax import linen as nn

from trix_jax.nn.positions import documents
from trix_jax.typing import AnyArray, Array, Bool, Integer, Shaped


def check_segments(
    segment_ids: Shaped[AnyArray, "..."] | None, lead: tuple
) -> Integer[Array, "..."] | None:
    """The segments as an array.

    Raises:
        ValueError: they are not integers, or not of the shape of the tokens.
    """
    if segment_ids is None:
        return None
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != lead:
        raise ValueError(
            f"segment_ids must be {list(lead)}, a number a token. Got {list(segment_ids.shape)}."
        )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids must be integers. Got {segment_ids.dtype}.")
    return segment_ids


def segments_of(
    module: nn.Module,
    tokens: Integer[Array, "B L"],
    segment_ids: Shaped[AnyArray, "..."] | None,
    mask: Bool[Array, "B L"] | None,
    decode: bool,
    document_mask: bool,
    end_token: int | None,
) -> Integer[Array, "B L"] | None:
    """The segments that are given, else the documents where `document_mask` keeps them
    apart; None: all tokens belong together.

    Args:
        module: whose cache counts documents in decoding.

    Raises:
        ValueError: segments of another shape or type, or to decode where documents are
            counted; documents without the mark that opens them.
    """
    segment_ids = check_segments(segment_ids, tokens.shape)
    if decode and segment_ids is not None and document_mask:
        raise ValueError(
            "segment_ids must be left out to decode with document_mask=True, which counts documents."
        )
    if segment_ids is not None or not document_mask:
        return segment_ids
    if end_token is None:
        raise ValueError(
            "end_token must be set with document_mask=True: the id that opens a document. Got None."
        )
    return documents(module, tokens, end_token, mask, decode)
