"""TriX layers as plain functions: jit, grad, vmap, scan over layers, remat, shard_map.

    python examples/plain_functions.py

`apply` is a pure function of `{"params", "routing"}`, so JAX's transformations work as
they do on any other; what to do with the routing state is said at each. `x` stands for
token embeddings: the first layer matches its own input, the stack of layers gets `x` as
`router_input`.
"""

import os

os.environ["XLA_FLAGS"] = " ".join(  # four virtual devices, beside what is asked for
    [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=4"]
)

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from trix_jax import SparseTriXFFN, routing

D, LAYERS = 16, 3
ffn = SparseTriXFFN(D, num_tiles=16, tiles_per_token=4)
x = jax.random.normal(jax.random.key(0), (8, 4, D))
variables = ffn.init(jax.random.key(1), x)

# jit. The routes may change from call to call, the trace does not.
forward = jax.jit(lambda variables, x: ffn.apply(variables, x)[0])
y = forward(variables, x)
forward(variables, -x)
assert forward._cache_size() == 1


# grad, with respect to the parameters alone: the state rides along as the auxiliary
# value.
def loss_fn(params, state, x, ffn=ffn):
    variables = {"params": params, "routing": state}
    (y, _, aux), new = ffn.apply(variables, x, train=True, mutable=["routing"])
    return jnp.mean((y - jnp.sin(x)) ** 2) + aux["total_aux"], new["routing"]


params, state = variables["params"], variables["routing"]
grads, reported = jax.jit(jax.grad(loss_fn, has_aux=True))(params, state, x)
moved = routing.update(reported)
assert (moved["tiles"]["router"]["bias"] != 0).any()

# vmap, over the batch: the same outputs, each example with counts of its own.
outputs, info, _ = jax.jit(jax.vmap(lambda row: ffn.apply(variables, row)))(x)
assert jnp.allclose(outputs, y, atol=1e-5)
assert info.counts.shape == (8, 16)

# scan over layers, with remat: weights and state carry a leading axis, `routing.update`
# takes them as they are.
keys = jax.random.split(jax.random.key(2), LAYERS)
stack = jax.vmap(lambda key: ffn.init(key, x))(keys)


def stack_loss(params, state, x):
    @jax.checkpoint
    def layer(h, weights):
        params, state = weights
        variables = {"params": params, "routing": state}
        (y, _, aux), new = ffn.apply(
            variables, h, train=True, router_input=x, mutable=["routing"]
        )
        return h + y, (aux["total_aux"], new["routing"])

    y, (aux, reported) = jax.lax.scan(layer, x, (params, state))
    return jnp.mean((y - jnp.sin(x)) ** 2) + aux.sum(), reported


grads, reported = jax.jit(jax.grad(stack_loss, has_aux=True))(
    stack["params"], stack["routing"], x
)
moved = routing.update(reported)
assert moved["tiles"]["router"]["bias"].shape == (LAYERS, 16)

# shard_map, data parallel. Two traps: the layer and `update` take the axis name, so
# that losses and loads are those of the whole batch; and `check_vma=False`, because
# under shard_map's own rule the gradient of replicated parameters arrives summed
# already, and a pmean would not undo it.
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
parallel_ffn = ffn.clone(axis_name="data")
P = PartitionSpec


def device_step(params, state, x):
    grads, reported = jax.grad(loss_fn, has_aux=True)(params, state, x, parallel_ffn)
    grads = jax.lax.pmean(grads, "data")
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params, routing.update(reported, axis_name="data")


step = jax.shard_map(
    device_step,
    mesh=mesh,
    in_specs=(P(), P(), P("data")),
    out_specs=(P(), P()),
    check_vma=False,
)
four_params, four_state = jax.jit(step)(params, state, x)

grads, reported = jax.jit(jax.grad(loss_fn, has_aux=True))(params, state, x)
one_params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
one_state = routing.update(reported)
for four, one in ((four_params, one_params), (four_state, one_state)):
    for a, b in zip(jax.tree.leaves(four), jax.tree.leaves(one), strict=True):
        assert jnp.allclose(a, b, atol=1e-6)
print("jit, grad, vmap, scan, remat and shard_map agree")
