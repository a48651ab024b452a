"""Runs every kernel on packed weights on the attached GPU: first against its oracle, then timed.

    python -m trix_kernels.measure gpu.json

Inputs of a check are integers whose sums float32 holds exactly, so results must be equal
bit for bit; int8 activations are real numbers, equal bit for bit too. Blocks that are
not used hold NaN, and every kernel runs several times, since a race shows as a result
that moves.

Times are CUPTI's of all kernels that a call launches, without the gaps between them, on
as many sets of inputs in turn as exceed the L2 cache. Beside each the same product by
XLA from the same two bits, and in bfloat16 on whole weights, a matrix product a tile.
"""

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trix_kernels.aot import CASES, Case
from trix_kernels.device import unsupported_reason
from trix_kernels.quantize import quantize
from trix_kernels.tile_ffn import block_ffn
from trix_kernels.tile_ffn import reference as ffn_reference
from trix_kernels.tile_matmul import block_matmul, reference
from trix_kernels.tile_matmul.api import Implementation
from trix_kernels.weights import Packed, pack

AGAIN = 5  # runs whose bits must agree
ROUNDS = 20  # runs whose median is the time
CACHE_BYTES = 128e6  # of inputs in turn, more than twice the L2 cache

# Shapes where blocks, steps, splits, groups and widths begin and end.
EDGES = (
    *(Case("tile_matmul", 3, rows, rows, 512, 128) for rows in (8, 16, 32, 64, 128)),
    *(Case("tile_matmul", 3, 16, 16, width, 128) for width in (128, 256, 384, 1152)),
    *(Case("tile_matmul", 3, 16, 16, 512, width) for width in (64, 192, 256)),
    *(Case("tile_matmul", 2, rows, rows, 2048, 128) for rows in (8, 64)),  # split
    *(Case("tile_matmul", 3, 64, 64, 512, 128, groups=g) for g in (2, 4)),
    Case("tile_matmul", 5, 40, 8, 384, 64, groups=3),
    *(
        Case("tile_matmul", 3, rows, rows, 512, 128, activations="int8")
        for rows in (8, 16, 32, 64, 128)
    ),
    *(
        Case("tile_matmul", 3, 16, 16, width, 64, activations="int8")
        for width in (256, 768, 4096)
    ),
)  # fmt: skip

# Two matmuls each, and what lies between them.
FFNS = (
    Case("tile_ffn", 16, 512, 64, 512, 512, hidden=512),
    Case("tile_ffn", 64, 128, 64, 512, 512, hidden=128),
    Case("tile_ffn", 64, 16, 16, 1024, 1024, hidden=1024),
)


def squared_relu(h: Any) -> Any:
    """The activation of every FFN measured: `max(h, 0) ** 2`."""
    return jnp.square(jnp.maximum(h, 0))


def check(case: Case, implementation: Implementation = "mosaic_gpu") -> None:
    """Holds a kernel against its oracle.

    Raises:
        AssertionError: results differ from the oracle's, or from run to run.
        NotImplementedError: the implementation does not run on this device, and why.
    """
    rng = np.random.default_rng(0)
    is_int8, largest = case.activations == "int8", 1 if case.hidden else 4
    x = rng.integers(-largest, largest + 1, (case.blocks, case.block, case.d_in))
    x = x.astype(np.float32)
    if is_int8:
        x = rng.normal(size=x.shape) * rng.lognormal(sigma=3, size=(*x.shape[:2], 1))
    x = np.array(jnp.asarray(x, jnp.bfloat16), np.float32)
    tile = rng.integers(0, case.tiles, case.blocks).astype(np.int32)
    used = max(case.blocks - 1, 1)
    x[used:] = np.nan
    made = [_weights(rng, case, *shape) for shape in _matrices(case)]
    call = _call(case, implementation)
    args = jnp.asarray(x, jnp.bfloat16), *(w for *_, w in made), jnp.asarray(tile)
    y = np.array(call(*args, jnp.asarray([used], jnp.int32))[:used], np.float32)
    real, tile = x[:used], tile[:used]
    if case.hidden:
        up, down = ((q, scale) for q, scale, _ in made)
        expected = ffn_reference.tile_ffn(
            real, up, down, tile, lambda h: _bfloat16(np.square(np.maximum(h, 0)))
        )
    elif is_int8:
        ((q, scale, _),) = made
        values, token = _rounded(args[0][:used])
        sums = reference.tile_matmul(values, q, np.ones_like(scale), tile)
        expected = sums.astype(np.float32) * scale[tile] * token
    else:
        ((q, scale, _),) = made
        expected = reference.tile_matmul(real, q, scale, tile)
    np.testing.assert_array_equal(y, _bfloat16(expected), err_msg=case.name)
    for _ in range(AGAIN):
        again = call(*args, jnp.asarray([used], jnp.int32))[:used]
        np.testing.assert_array_equal(
            np.asarray(again, np.float32), y, err_msg=f"{case.name}, run again"
        )


def _matrices(case: Case) -> list[tuple[int, int]]:
    """Inputs and outputs of each matrix of a tile."""
    if case.hidden:
        return [(case.d_in, case.hidden), (case.hidden, case.d_out)]
    return [(case.d_in, case.d_out)]


def _rounded(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Int8 activations as this device rounds them, held against the oracle's: XLA's
    division on a GPU may be off by two units in the last place, which moves a value
    next to a half by one.
    """
    values, scale = (np.asarray(a) for a in jax.jit(quantize)(x))
    expected, expected_scale = reference.quantize(np.asarray(x, np.float32))
    np.testing.assert_array_equal(scale, expected_scale)
    moved = np.abs(values.astype(np.int32) - expected)
    print(f"rounded otherwise: {(moved > 0).sum()} of {moved.size}")
    np.testing.assert_array_less(moved, 2)
    return values, scale


def _weights(rng, case: Case, d_in: int, d_out: int) -> tuple[Any, Any, Packed]:
    """Ternary weights, and scales that are powers of two."""
    groups = case.groups if d_in == case.d_in else 1
    q = rng.integers(-1, 2, (case.tiles, d_in, d_out)).astype(np.int8)
    scale = rng.choice([0.25, 0.5, 1.0], (case.tiles, groups, d_out))
    scale = scale.astype(np.float32)
    return q, scale, pack(jnp.asarray(q), jnp.asarray(scale), "planar")


def _call(case: Case, implementation: Implementation | None) -> Callable:
    """The op of a case as a jitted function of blocks, weights, tiles and used."""
    if case.hidden:
        op = functools.partial(
            block_ffn, shape=(case.hidden, case.d_out), act=squared_relu
        )
    else:
        op = functools.partial(
            block_matmul, features=case.d_out, activations=case.activations
        )
    op = functools.partial(op, implementation=implementation)
    return jax.jit(lambda x, *rest: op(x, *rest[:-1], used=rest[-1]))


def _bfloat16(x: Any) -> np.ndarray:
    return np.asarray(jnp.asarray(np.asarray(x, np.float32), jnp.bfloat16), np.float32)


def sets_of(case: Case) -> list[tuple]:
    """Random inputs and two-bit weights, as many sets as exceed the L2 cache."""
    packed = case.weights // 4 + 2 * case.blocks * case.block * (case.d_in + case.d_out)
    count = int(np.clip(CACHE_BYTES // packed, 1, 32))
    return [_inputs(case, seed) for seed in range(count)]


def _inputs(case: Case, seed: int) -> tuple:
    key = jax.random.key(seed)
    shape = case.blocks, case.block, case.d_in
    x = jax.random.normal(key, shape, jnp.bfloat16)
    tile = jnp.repeat(
        jnp.arange(case.tiles, dtype=jnp.int32), case.blocks // case.tiles
    )
    weights = []
    for i, o in _matrices(case):
        groups = case.groups if i == case.d_in else 1
        q = jax.random.randint(key, (case.tiles, i, o), -1, 2, jnp.int8)
        scale = jnp.full((case.tiles, groups, o), i**-0.5, jnp.float32)
        weights.append(pack(q, scale, "planar"))
    return x, *weights, tile, jnp.asarray([case.blocks], jnp.int32)


def bfloat16_sets(case: Case) -> list[tuple]:
    """The same with whole weights, `[N, I, O]`, and rows by tile, `[N, R, I]`."""
    each = 2 * case.weights + 2 * case.tiles * case.rows * (case.d_in + case.d_out)
    count = int(np.clip(CACHE_BYTES // each, 1, 32))

    def make(seed):
        key = jax.random.key(seed)
        x = jax.random.normal(key, (case.tiles, case.rows, case.d_in), jnp.bfloat16)
        weights = [
            jax.random.normal(key, (case.tiles, i, o), jnp.bfloat16) * i**-0.5
            for i, o in _matrices(case)
        ]
        return x, *weights

    return [make(seed) for seed in range(count)]


def bfloat16_call(x: jax.Array, *weights: jax.Array) -> jax.Array:
    """`x @ w` a tile, or both products of an FFN."""
    first, *second = weights
    y = jnp.matmul(x, first)
    for w in second:
        y = jnp.matmul(squared_relu(y), w)
    return y


def seconds(call: Callable, sets: Sequence[tuple]) -> list[float]:
    """CUPTI's time of a call, `ROUNDS` times, each the mean over all sets of inputs.

    Raises:
        RuntimeError: nothing ran on a GPU.
    """
    from jax.experimental.mosaic.gpu import profiler

    def all_of(sets):
        return [call(*args) for args in sets]

    jitted = jax.jit(all_of)
    _, taken = profiler.measure(jitted, iterations=ROUNDS)(sets)
    if taken is None:
        raise RuntimeError("CUPTI saw no kernel of this call.")
    return [1e-3 * t / len(sets) for t in taken]


def time(case: Case) -> dict[str, Any]:
    """Microseconds of a call: medians, and the quartiles' range of ours."""
    sets = sets_of(case)
    taken = {"kernel": seconds(_call(case, "mosaic_gpu"), sets)}
    taken["xla"] = seconds(_call(case, "xla"), sets[:4])
    del sets
    if case.activations == "float" and case.groups == 1:
        taken["bfloat16"] = seconds(bfloat16_call, bfloat16_sets(case))
    us = {name: round(1e6 * float(np.median(t)), 2) for name, t in taken.items()}
    quartiles = np.percentile(taken["kernel"], [25, 75])
    return {
        "name": case.name,
        "us": us,
        "quartiles_us": [round(1e6 * float(q), 2) for q in quartiles],
    }


def ceilings(
    size: int = 8192,
    copied: int = 2**29,
    seconds: Callable[[Callable, Sequence[tuple]], list[float]] = seconds,
) -> dict[str, float]:
    """What this GPU does at best: a product of `size` cubed, and a copy, bytes read and
    written, of `copied` numbers of two bytes.
    """
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = np.median(seconds(lambda a, b: jnp.matmul(a, b), [(x, x.T)]))
    big = jnp.zeros((copied,), jnp.bfloat16)
    copy = np.median(seconds(lambda a: a + 1, [(big,)]))
    return {
        "tflops": round(2 * size**3 / float(product) / 1e12, 1),
        "gb_per_second": round(2 * big.nbytes / float(copy) / 1e9, 1),
    }


def main(output: Path) -> int:
    """Checks, then times, and returns how many checks failed; the file names them.

    Raises:
        NotImplementedError: no kernel runs on this device, and why.
    """
    if reason := unsupported_reason():
        raise NotImplementedError(reason)
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "capability": str(getattr(device, "compute_capability", "")),
        "versions": {"jax": jax.__version__, "cuda": device.client.platform_version},
    }
    failed = []
    every = (*EDGES, *CASES, *FFNS)
    for case in every:
        print("check", case.name, flush=True)
        try:
            check(case)
        except (AssertionError, RuntimeError) as error:
            # The other kernels are still worth a look.
            failed.append(case.name)
            print(f"FAILED {case.name}: {str(error)[:600]}", flush=True)
    result |= {"checked": len(every), "failed": failed}
    output.write_text(json.dumps(result, indent=1))
    result |= {"ceilings": ceilings(), "kernels": []}
    for case in (*CASES, *FFNS):
        if case.name not in failed:
            result["kernels"].append(time(case))
            print(result["kernels"][-1], flush=True)
            output.write_text(json.dumps(result, indent=1))
    return len(failed)


if __name__ == "__main__":
    sys.exit(1 if main(Path(sys.argv[1])) else 0)
