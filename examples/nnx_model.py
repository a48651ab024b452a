"""A TriX layer inside a Flax NNX model: trained, evaluated, packed.

    python examples/nnx_model.py

The routing state arrives as variables of the type `Routing`, which is not `nnx.Param`:
the optimizer leaves it alone. A call in training fills it, `update_routing` moves it.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from trix_jax import SparseTriXFFN
from trix_jax.interop.nnx import Layer, Routing, freeze, update_routing


class Regressor(nnx.Module):
    """Computes `head(x + ffn(x))` with `x = embed(inputs)`."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.embed = nnx.Linear(2, width, rngs=rngs)
        ffn = SparseTriXFFN(width, num_tiles=16, tiles_per_token=4)
        sample = jnp.zeros((1, width))
        self.ffn = Layer(ffn, sample, rngs=rngs)
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, inputs):
        x = self.embed(inputs)
        # In a deeper model every layer gets the embedding as its `router_input`.
        y, info, aux = self.ffn(x, router_input=x)
        return self.head(x + y), info, aux["total_aux"]


@nnx.jit
def step(model, optimizer, inputs, target):
    def loss_fn(model):
        prediction, _, aux = model(inputs)
        task = jnp.mean((prediction - target) ** 2)
        return task + aux, task

    grads, task = nnx.grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    update_routing(model)
    return task


inputs = jax.random.uniform(jax.random.key(0), (256, 2), minval=-2, maxval=2)
target = jnp.sin(inputs[:, :1] * inputs[:, 1:])

model = Regressor(32, nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
first = step(model, optimizer, inputs, target)
for _ in range(200):
    loss = step(model, optimizer, inputs, target)
print(f"task loss {first:.3f}, then {loss:.3f}")
assert loss < first / 2

state = nnx.to_pure_dict(nnx.state(model, Routing))["ffn"]["tiles"]["router"]
assert (state["bias"] != 0).any()  # it moved
assert not state["margins"].any()  # and starts anew for the next step
model.eval()
prediction, info, _ = model(inputs)
print(f"tokens a tile {info.counts.astype(int)}")
served = freeze(model, inputs)
difference = jnp.abs(served(inputs)[0] - prediction).max()
print(f"packed to two bits a weight, outputs within {difference:.0e}")
assert difference < 1e-5
