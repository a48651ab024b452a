"""`SparseTriXFFN` by signatures: four of sixteen ternary tiles a token, those whose
address matches the token's embedding, in a training step of your own.

    python examples/sparse_ffn.py
"""

import jax
import jax.numpy as jnp

from trix_jax import SparseTriXFFN, freeze, routing

table = jax.random.normal(jax.random.key(0), (50, 32))  # a model's embeddings
tokens = jax.random.randint(jax.random.key(1), (8, 16), 0, 50)  # (batch, length)
embeddings = table[tokens]
x = embeddings + 0.5 * jax.random.normal(jax.random.key(2), embeddings.shape)
target = jnp.sin(2 * x)  # x: the hidden state that reaches the FFN

ffn = SparseTriXFFN(d_model=32, num_tiles=16, tiles_per_token=4)
variables = ffn.init(jax.random.key(3), x)  # "params", and the routing's state


@jax.jit
def step(params, state):
    def loss_fn(params):
        variables = {"params": params, "routing": state}
        (y, _, aux), new = ffn.apply(
            variables, x, train=True, router_input=embeddings, mutable=["routing"]
        )
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
y, info, _ = ffn.apply(packed, x, router_input=embeddings)
assert (y == ffn.apply(trained, x, router_input=embeddings)[0]).all()
by_token = {}
for token, tiles in zip(tokens.ravel(), info.tiles.reshape(-1, 4), strict=True):
    by_token.setdefault(int(token), set()).add(tuple(tiles.tolist()))
assert all(len(found) == 1 for found in by_token.values())  # the token alone decides
print(f"equal bit for bit after packing; tokens a tile {info.counts.astype(int)}")
