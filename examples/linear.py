"""`TriXLinear`: a ternary linear layer, trained by SGD, packed into two bits a weight.

python examples/linear.py
"""

import jax
import jax.numpy as jnp

from trix_jax import TriXLinear, freeze

x = jax.random.normal(jax.random.key(0), (64, 32))
target = x @ jnp.sign(jax.random.normal(jax.random.key(1), (32, 16)))  # ternary itself

layer = TriXLinear(features=16, num_tiles=4)
variables = layer.init(jax.random.key(2), x)  # no routing: all tiles are computed


@jax.jit
def step(params):
    def loss_fn(params):
        return jnp.mean((layer.apply({"params": params}, x) - target) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(params)
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads), loss


params, first = step(variables["params"])
for _ in range(20):
    params, loss = step(params)
print(f"loss {first:.3f}, then {loss:.3f}")
assert loss < first

# The gate, a value a tile and token, switches tiles: here only the first is on.
gate = jnp.zeros((64, 4)).at[:, 0].set(1)
assert not layer.apply({"params": params}, x, gate)[:, 4:].any()

packed = freeze(layer, {"params": params}, x)
assert (layer.apply(packed, x) == layer.apply({"params": params}, x)).all()
sizes = {k: v.nbytes for k, v in packed["packed"]["kernel"].items()}
print(f"equal bit for bit after packing {params['kernel']['kernel'].nbytes} to {sizes}")
