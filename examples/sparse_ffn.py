"""`SparseTriXFFN`: flat routing over a few ternary tiles, in a training step of your
own.

    python examples/sparse_ffn.py
"""

import jax
import jax.numpy as jnp

from trix_jax import SparseTriXFFN, freeze, routing

x = jax.random.normal(jax.random.key(0), (8, 16, 32))  # (batch, length, d_model)
target = jnp.sin(2 * x)

ffn = SparseTriXFFN(d_model=32, num_tiles=4, tiles_per_token=2)
variables = ffn.init(jax.random.key(1), x)  # "params", and the routing's state


@jax.jit
def step(params, state):
    def loss_fn(params):
        variables = {"params": params, "routing": state}
        (y, _, aux), new = ffn.apply(variables, x, train=True, mutable=["routing"])
        task = jnp.mean((y - target) ** 2)
        return task + aux["total_aux"], (task, new["routing"])  # 1. add total_aux

    grads, (task, reported) = jax.grad(loss_fn, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    return params, routing.update(reported), task  # 2. move the routing state


params, state = variables["params"], variables["routing"]
params, state, first = step(params, state)
for _ in range(20):
    params, state, loss = step(params, state)
print(f"task loss {first:.3f}, then {loss:.3f}")
assert loss < first

trained = {"params": params, "routing": state}
packed = freeze(ffn, trained, x)
y, info, _ = ffn.apply(packed, x)
assert (y == ffn.apply(trained, x)[0]).all()
print(f"equal bit for bit after packing; tokens a tile {info.counts.astype(int)}")
