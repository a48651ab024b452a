"""The six grouped products of a training FFN: equal to the oracle, and timed."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Case, Row, by_cupti, timed
from trix_jax import dispatch, ops
from trix_jax.nn.activations import squared_relu
from trix_kernels.grouped_matmul import (
    device_reason,
    grouped_matmul,
    grouped_outer,
    reference,
    transposed_matmul,
    unsupported_reason,
)
from trix_kernels.grouped_matmul.cases import CASES, D
from trix_kernels.grouped_matmul.cases import Case as Product

Load = Literal["balanced", "skewed", "empty"]
LOADS: tuple[Load, ...] = ("balanced", "skewed", "empty")
ACT = squared_relu  # layers' own, where nothing else is asked for


class Groups(NamedTuple):
    """Blocks of `rows` rows, see `grouped_matmul`."""

    tile: Any
    filled: Any
    rows: int
    source: Any


def products(shapes: Shapes, tiles: int) -> list[Product]:
    """The six products of the shapes that the kernels are compiled for, at these."""
    widths = {True: shapes.width, False: shapes.tile_width}
    return [
        case._replace(
            tiles=tiles,
            inputs=widths[case.inputs == D],
            outputs=widths[case.outputs == D],
            tokens=shapes.tokens,
            per_token=shapes.per_token,
        )
        for case in CASES
        if case.tiles == CASES[0].tiles
    ]


def counts(load: Load, rows: int, tiles: int) -> np.ndarray:
    """Rows of each tile. "skewed": shares as 1, 1/2, 1/3, ...; "empty": every other tile
    has none, and the second one half of all.
    """
    shares = np.ones(tiles)
    if load == "skewed":
        shares = 1 / np.arange(1, tiles + 1)
    if load == "empty":
        shares[::2] = 0
        shares[1] = max(shares.sum() - 1, 1)
    ends = np.round(np.cumsum(shares) / shares.sum() * rows).astype(int)
    return np.diff(ends, prepend=0)


def groups_of(load: Load, rows: int, tiles: int, block: int) -> Groups:
    """The blocks of a load as a plan makes them."""
    chosen = np.repeat(np.arange(tiles), counts(load, rows, tiles))
    plan = _plan(jnp.asarray(chosen, jnp.int32)[:, None], tiles, block)
    filled = (plan.source < rows).sum(axis=1, dtype=jnp.int32)
    return Groups(plan.block_tile, filled, block, plan.source)


_plan = jax.jit(dispatch.make_plan, static_argnums=(1, 2))


def call_of(case: Product, implementation: Any = None) -> Callable:
    """A product as a jitted function of its two arrays, the tiles of blocks, and how
    many of their rows count.

    Args:
        implementation: None is the kernels where they run.
    """

    def product(left, right, tile, filled):
        how: dict[str, Any] = {
            "implementation": implementation or ran(case, left)["implementation"]
        }
        match case.product:
            case "forward":
                return grouped_matmul(left, right, tile, filled, **how)
            case "transposed":
                return transposed_matmul(left, right, tile, filled, **how)
            case "outer":
                return grouped_outer(left, right, tile, case.tiles, filled, **how)

    return jax.jit(product)


def oracle(case: Product, left: Any, right: Any, tile: Any, filled: Any) -> np.ndarray:
    """The same in numpy, in float64."""
    left, right, tile, filled = map(np.asarray, (left, right, tile, filled))
    match case.product:
        case "forward":
            return reference.grouped_matmul(left, right, tile)
        case "transposed":
            return reference.transposed_matmul(left, right, tile)
        case "outer":
            return reference.grouped_outer(left, right, tile, filled, case.tiles)


def inputs(case: Product, groups: Groups, is_whole: bool) -> tuple[Any, Any]:
    """Both arrays in bfloat16.

    Args:
        is_whole: integers whose sums float32 holds exactly, and NaN in rows that do not
            count; else random numbers.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    blocks, weights = groups.tile.shape[0], (case.tiles, case.inputs, case.outputs)
    x, dy = ((blocks, groups.rows, n) for n in (case.inputs, case.outputs))
    shapes = {
        "forward": (x, weights),
        "transposed": (dy, weights),
        "outer": (x, dy),
    }[case.product]
    if not is_whole:
        left, right = (
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        )
        return left, right
    left, right = (
        jax.random.randint(key, shape, -most, most + 1).astype(jnp.bfloat16)
        for key, shape, most in zip(keys, shapes, (4, 1), strict=True)
    )
    right = _with_nan(right, groups) if case.product == "outer" else right
    return _with_nan(left, groups), right


def _with_nan(x, groups):
    return jnp.where(_counted(groups), x, jnp.nan)


def _counted(groups):
    """Which rows of the blocks count, `[M, R, 1]`."""
    return (jnp.arange(groups.rows)[None] < groups.filled[:, None])[..., None]


def ran(case: Product, left: Any) -> Row:
    """Which implementation `call_of` takes, and why if it is XLA's."""
    reason = unsupported_reason(left, case.inputs, case.outputs)
    return (
        {"implementation": "xla", "reason": reason}
        if reason
        else {"implementation": "mosaic_gpu"}
    )


def has_kernels() -> bool:
    """Whether the default device has kernels for grouped products."""
    return device_reason() is None


def checks(shapes: Shapes) -> Iterator[Row]:
    """Every product under every load, on integers, `again` times: equal to numpy's at a
    small size, and to XLA's at the size that is timed.
    """
    for tiles in shapes.tiles:
        for case in products(shapes, tiles):
            small = case._replace(tokens=shapes.checked_tokens)
            yield from check(small, shapes, "numpy", functools.partial(oracle, small))
            yield from check(case, shapes, "xla", call_of(case, "xla"))
            if case.numbered:
                yield from check_numbered(case, shapes)


def check(
    case: Product, shapes: Shapes, against: str, expect: Callable
) -> Iterator[Row]:
    """One product under every load, against `expect(left, right, tile, filled)`."""
    call = call_of(case)
    for load in LOADS:
        groups = groups_of(load, case.rows, case.tiles, shapes.rows)
        left, right = inputs(case, groups, is_whole=True)
        args = left, right, groups.tile, groups.filled
        expected, wrong = jnp.asarray(expect(*args), jnp.float32), []
        for _ in range(shapes.again):
            found = call(*args)
            is_other = found != expected.astype(found.dtype)
            if case.product != "outer":
                is_other &= _counted(groups)
            wrong.append(int(is_other.sum()))
        about = {"load": load, "against": against, "tokens": case.tokens}
        about |= ran(case, left) | {"times": len(wrong)}
        failed = {"failed": f"{wrong} numbers differ"} if any(wrong) else {}
        yield {"name": f"{case.name}, {load}, {against}", **about, **failed}


def numbers_of(case: Product, groups: Groups) -> Any:
    """The token in every row of the blocks; -1 where none is."""
    return jnp.where(groups.source < case.rows, groups.source % case.tokens, -1)


def call_by_number(case: Product) -> Callable:
    """The same product of tokens that are read by number, as `call_of`; its first array
    are tokens. Products that come with more return all of it, see `alongside`.
    """

    def product(tokens, other, tile, filled, rows, *more):
        groups = ops.Groups(tile, filled, jnp.arange(case.tiles, dtype=jnp.int32))
        if case.product == "forward":
            return ops.numbered_matmul_and_act(tokens, other, groups, rows, ACT)
        if case.product == "transposed":
            h, gate = more
            how = groups, rows, h, gate, ACT
            return ops.numbered_hidden_gradient(tokens, other, *how)
        is_left = case.use == "gradient of up"
        pair = (tokens, other) if is_left else (other, tokens)
        return ops.numbered_outer(*pair, groups, rows)

    return jax.jit(product)


def alongside(
    case: Product, y: jax.Array, h: Any = None, gate: Any = None
) -> jax.Array:
    """What `call_by_number` makes of a product, `joined`: of the gradient of a hidden
    layer h, `act'(h) * gate * y`, `gate * act(h)` and `<y, act(h)>`.
    """
    if case.product == "forward":
        return joined((y, ACT(y)))
    if case.product == "transposed":
        a, pull = jax.vjp(ACT, h)
        (dh,) = pull((gate[..., None] * y).astype(h.dtype))
        dots = (y.astype(jnp.float32) * a.astype(jnp.float32)).sum(axis=-1)
        return joined((dh, gate[..., None] * a, dots))
    return joined(y)


def joined(parts: Any) -> jax.Array:
    """Arrays of rows, or of a number a row, as one in float32; one array as it is."""
    if isinstance(parts, jax.Array):
        return parts.astype(jnp.float32)
    rows = (part if part.ndim == 3 else part[..., None] for part in parts)
    return jnp.concatenate([part.astype(jnp.float32) for part in rows], axis=-1)


def numbered_args(case: Product, groups: Groups, is_whole: bool) -> tuple[Any, ...]:
    """Arguments of `call_by_number`: the other array is that of `inputs`. What comes with
    a product differs from row to row and from column to column, and stays exact.
    """
    left, right = inputs(case, groups, is_whole)
    is_right = case.product == "outer" and case.use == "gradient of down"
    wide, other = (right, left) if is_right else (left, right)
    key, shape = jax.random.key(2), (case.tokens, wide.shape[-1])
    tokens = jax.random.normal(key, shape, jnp.bfloat16)
    if is_whole:
        tokens = jax.random.randint(key, shape, -4, 5).astype(jnp.bfloat16)
    rows, more = numbers_of(case, groups), ()
    if case.product == "transposed":
        keys = jax.random.split(jax.random.key(3))
        h = jax.random.randint(keys[0], (*rows.shape, case.inputs), -2, 3)
        gate = 2.0 ** jax.random.randint(keys[1], rows.shape, -2, 2)
        more = h.astype(jnp.bfloat16), gate.astype(jnp.float32)
    return tokens, other, groups.tile, groups.filled, rows, *more


def check_numbered(case: Product, shapes: Shapes) -> Iterator[Row]:
    """A product of tokens read by number under every load, on integers, against XLA's of
    their blocks; traced alone where the kernels do not run.
    """
    call, expect = call_by_number(case), call_of(case, "xla")
    for load in LOADS:
        groups = groups_of(load, case.rows, case.tiles, shapes.rows)
        args = numbered_args(case, groups, is_whole=True)
        tokens, other, tile, filled, rows, *more = args
        row = {
            "name": f"{case.name}, {load}, by number",
            "load": load,
            "against": "xla",
        }
        if not has_kernels():
            jax.eval_shape(call, *args)
            yield row | {"traced_only": True}
            continue
        blocks = jnp.where(_counted(groups), tokens[rows], 0)
        is_right = case.product == "outer" and case.use == "gradient of down"
        pair = (other, blocks) if is_right else (blocks, other)
        expected, wrong = alongside(case, expect(*pair, tile, filled), *more), []
        for _ in range(shapes.again):
            is_other = joined(call(*args)) != expected
            if case.product != "outer":
                is_other &= _counted(groups)
            wrong.append(int(is_other.sum()))
        failed = {"failed": f"{wrong} numbers differ"} if any(wrong) else {}
        yield row | {"times": len(wrong), **failed}


def times(shapes: Shapes) -> Iterator[Row]:
    """Every product, balanced, beside cuBLAS' batched product of equal groups."""
    for tiles in shapes.tiles:
        for case in products(shapes, tiles):
            others = {"batched": batched(case)}
            if case.numbered and has_kernels():
                groups = groups_of("balanced", case.rows, case.tiles, shapes.rows)
                args = numbered_args(case, groups, is_whole=False)
                others["by number"] = Case(call_by_number(case), args)
            yield from timed_product(case, shapes, others)


def timed_product(
    case: Product, shapes: Shapes, others: dict[str, Case]
) -> Iterator[Row]:
    """A product and other ways to compute it, in turn."""
    ours = ours_of(case, shapes)
    cases = {"ours": ours, **others}
    for name, row in timed(cases, shapes).items():
        flops = 2 * case.rows * case.inputs * case.outputs
        is_ours = ran(case, ours.args[0]) if name == "ours" else {}
        row |= by_cupti(cases[name]) if "us" in row else {}
        if us := row.get("kernel_us") or row.get("us"):
            row["tflops"] = round(flops / us / 1e6, 1)
        about = {"tiles": case.tiles, "product": case.name, "way": name}
        yield {"name": f"{case.name}: {name}", **about, **is_ours, **row}


def ours_of(case: Product, shapes: Shapes) -> Case:
    groups = groups_of("balanced", case.rows, case.tiles, shapes.rows)
    arrays = inputs(case, groups, is_whole=False)
    return Case(call_of(case), (*arrays, groups.tile, groups.filled))


def batched(case: Product) -> Case:
    """The product of equal groups, a matrix a tile."""
    rows, keys = case.rows // case.tiles, jax.random.split(jax.random.key(1), 3)
    sizes = {
        "x": (rows, case.inputs),
        "dy": (rows, case.outputs),
        "w": (case.inputs, case.outputs),
    }
    x, dy, w = (
        jax.random.normal(key, (case.tiles, *size), jnp.bfloat16)
        for key, size in zip(keys, sizes.values(), strict=True)
    )
    match case.product:
        case "forward":
            return Case(jax.jit(jnp.matmul), (x, w))
        case "transposed":
            return Case(jax.jit(lambda dy, w: jnp.matmul(dy, w.mT)), (dy, w))
        case "outer":
            wide = {"preferred_element_type": jnp.float32}
            return Case(jax.jit(lambda x, dy: jnp.matmul(x.mT, dy, **wide)), (x, dy))
