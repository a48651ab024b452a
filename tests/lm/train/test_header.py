"""What a run says of its FFNs, before and after it."""

import dataclasses

import pytest

from trix_jax import RoutingConfig, TransformerConfig
from trix_jax.lm.config import RunConfig
from trix_jax.lm.report.page import describe_ffn
from trix_jax.lm.train.header import ffn_text

HASHED = TransformerConfig(
    ffn="sparse",
    num_tiles=96,
    tiles_per_token=12,
    expansion=24,
    shared_width=32,
    hash_per_layer=True,
    routing=RoutingConfig(source="hash"),
)


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        ({}, ""),
        ({"hash_sets": 64}, ", those of 1 of 64 sets"),
        ({"hash_sets": 32, "sets_per_token": 3}, ", those of 3 of 32 sets"),
    ],
)
def test_ffns_are_told_with_what_their_hash_chooses(sets, said):
    routing = RoutingConfig(source="hash", **sets)
    model = dataclasses.replace(HASHED, routing=routing)
    width = 24 * model.d_model // 96
    assert ffn_text(model) == (
        f"sparse FFN, 96 tiles of {width}, 12 a token by hash, another in every layer"
        f"{said}, beside a real FFN of 32"
    )
    assert describe_ffn(RunConfig(model=model)) == (
        "sparse FFNs of 96 tiles, 12 used by each token, by a hash of its id, another in "
        f"every layer{said}, and a real FFN of 32"
    )
