"""The layer against dense FFNs, and what of it is the router's, part by part."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.speed.gpu.shapes import Shapes
from experiments.speed.gpu.timing import Case, Row, by_cupti, timed
from trix_jax import dispatch, routing
from trix_jax.lm.bench.timing import forward
from trix_jax.nn.block import DenseFFN
from trix_jax.nn.sparse_ffn import SparseTriXFFN
from trix_jax.ternary import TernaryConfig, ternarize
from trix_kernels.grouped_matmul import device_reason

ACTIVATION = "relu2"  # of the dense FFNs too: the cheaper one
EQUAL, ACTIVE = "dense, equal parameters", "dense, active width"


def implementations() -> dict[str, dict[str, Any]]:
    """How the tiles' products are computed: by the kernels, asked for by name where this
    device has them, and by XLA.
    """
    kernels = None if device_reason() else "mosaic_gpu"
    return {"": {"implementation": kernels}, ", xla": {"implementation": "xla"}}


def models(shapes: Shapes, tiles: int) -> dict[str, Any]:
    """The layer in each implementation, and the dense FFNs of width N F and K F."""
    d, f, k = shapes.width, shapes.tile_width, shapes.per_token
    dense = {
        EQUAL: DenseFFN(d, tiles * f, ACTIVATION, dtype=jnp.bfloat16),
        ACTIVE: DenseFFN(d, k * f, ACTIVATION, dtype=jnp.bfloat16),
    }
    sizes: dict[str, Any] = {
        "num_tiles": tiles,
        "expansion": tiles * f // d,
        "tiles_per_token": k,
    }
    layers = {
        f"trix{name}": SparseTriXFFN(d, **sizes, dtype=jnp.bfloat16, **how)
        for name, how in implementations().items()
    }
    return layers | dense


def trained(model: Any) -> Callable:
    """The jitted gradients of parameters and input, what a layer of a training step
    computes: `(params, routing state, x, dy)`.
    """

    def loss(params, x, dy, state):
        variables = {"params": params, "routing": state}
        (y, _, aux), new = model.apply(variables, x, True, mutable=["routing"])
        return jnp.sum((y * dy).astype(jnp.float32)) + aux["total_aux"], new

    gradients = jax.grad(loss, (0, 1), has_aux=True)
    return jax.jit(lambda params, state, x, dy: gradients(params, x, dy, state))


def times(shapes: Shapes) -> Iterator[Row]:
    """Forward, and forward and backward, of every model in turn."""
    keys = jax.random.split(jax.random.key(0), 2)
    size = shapes.tokens, shapes.width
    x, dy = (jax.random.normal(key, size, jnp.bfloat16) for key in keys)
    for tiles in shapes.tiles:
        cases: dict[str, dict[str, Case]] = {"forward": {}, "forward and backward": {}}
        models_of = models(shapes, tiles)
        for name, model in models_of.items():
            variables = jax.jit(model.init)(jax.random.key(1), x[:1])
            params, state = variables["params"], variables.get("routing", {})
            cases["forward"][name] = Case(forward(model), (variables, x))
            cases["forward and backward"][name] = Case(
                trained(model), (params, state, x, dy)
            )
        for what, ways in cases.items():
            for name, row in timed(ways, shapes).items():
                about = {"tiles": tiles, "what": what, "way": name}
                if how := getattr(models_of[name], "implementation", None):
                    about["implementation"] = how
                if "us" in row:
                    row |= by_cupti(ways[name]) | memory(ways[name])
                yield {"name": f"{what}, {tiles} tiles: {name}", **about, **row}


def memory(case: Case) -> Row:
    """Bytes that a compiled call holds beside its arguments, and its arguments."""
    analysis: Any = case.call.lower(*case.args).compile().memory_analysis()
    return {
        "temporary_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
    }


def router(shapes: Shapes) -> Iterator[Row]:
    """Every step between tokens and blocks, alone."""
    for tiles in shapes.tiles:
        for name, case in router_cases(shapes, tiles).items():
            row = timed({name: case}, shapes)[name]
            about = {"tiles": tiles, "way": name, **by_cupti(case)}
            yield {"name": f"router, {tiles} tiles: {name}", **about, **row}


def router_cases(shapes: Shapes, tiles: int) -> dict[str, Case]:
    """The parts of the router and of the ways to blocks and back."""
    d, f, k = shapes.width, shapes.tile_width, shapes.per_token
    keys = jax.random.split(jax.random.key(2), 3)
    x = jax.random.normal(keys[0], (shapes.tokens, d), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (tiles, d, f))
    signature = routing.signatures(jax.random.normal(keys[2], (tiles, d)))
    score = jax.jit(routing.match)
    scores = score(x, signature)
    select = jax.jit(lambda s: routing.select_tiles(s, k))
    chosen = select(scores)
    plan = jax.jit(lambda t: dispatch.make_plan(t, tiles, shapes.rows))
    planned = plan(chosen)
    gather = jax.jit(dispatch.to_blocks)
    gates = jax.jit(lambda s, t: routing.gates(s, t, "sigmoid"))
    flat = chosen.reshape(-1).astype(jnp.int32)

    def combine(y, plan, gates):
        y_TKD = dispatch.from_blocks(y, plan)
        return (y_TKD * gates[..., None]).sum(axis=1).astype(y.dtype)

    def ternarized(w):
        weights = ternarize(w, TernaryConfig())
        return weights._replace(q=weights.q.astype(jnp.bfloat16))

    return {
        "ternarize one projection": Case(jax.jit(ternarized), (kernel,)),
        "scores": Case(score, (x, signature)),
        "select": Case(select, (scores,)),
        "gates": Case(gates, (scores, chosen)),
        "count": Case(jax.jit(lambda t: dispatch.count_tiles(t, tiles)), (chosen,)),
        "sort": Case(jax.jit(lambda t: jax.lax.sort((t, jnp.arange(t.size)))), (flat,)),
        "plan": Case(plan, (chosen,)),
        "gather to blocks": Case(gather, (x, planned)),
        "back and combine": Case(
            jax.jit(combine), (gather(x, planned), planned, gates(scores, chosen))
        ),
    }
