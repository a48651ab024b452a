"""The shapes that are measured, and those of the rehearsal."""

from typing import NamedTuple


class Shapes(NamedTuple):
    """What the parts measure: T tokens of width D, K of N tiles of F each.

    Attributes:
        name: written into every line of the file.
        tokens, width, tile_width, per_token: T, D, F and K of a layer.
        tiles: each N.
        sets: of K tiles, see `RoutingConfig.hash_sets`.
        rows: of a block, as the kernels have it.
        checked_tokens: T where numpy is the oracle.
        ceiling: size of the product that shows what the GPU multiplies at best.
        copied: numbers of two bytes whose copy shows what it moves at best.
        rounds: every function of a comparison is timed once a round, in turn.
        chain_seconds: a timing is of as many calls as take about as long.
        most_calls: of a timing.
        again: runs of a check whose bits must agree.
        vocabulary, context, layers, heads, sequences: of the language model's step.
        batches, prompt, new_tokens: of generation.
        evaluated: sequences of an evaluation.
        trains_for: steps after which losses of two implementations are compared.
    """

    name: str = "full"
    tokens: int = 16384
    width: int = 1024
    tile_width: int = 256
    per_token: int = 4
    tiles: tuple[int, ...] = (16, 64)
    sets: int = 64
    rows: int = 128
    checked_tokens: int = 1024
    ceiling: int = 8192
    copied: int = 2**29
    rounds: int = 7
    chain_seconds: float = 0.02
    most_calls: int = 50
    again: int = 5
    vocabulary: int = 32768
    context: int = 1024
    layers: int = 12
    heads: int = 16
    sequences: int = 16
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 128
    new_tokens: int = 128
    evaluated: int = 64
    trains_for: int = 3


FULL = Shapes()
REHEARSAL = Shapes(
    name="rehearsal",
    tokens=96,
    width=128,
    tile_width=128,
    per_token=2,
    tiles=(4,),
    sets=3,
    rows=128,
    checked_tokens=12,
    ceiling=16,
    copied=64,
    rounds=2,
    chain_seconds=0.0,
    most_calls=1,
    again=2,
    vocabulary=32,
    context=16,
    layers=1,
    heads=2,
    sequences=2,
    batches=(1, 2),
    prompt=3,
    new_tokens=2,
    evaluated=2,
    trains_for=1,
)
