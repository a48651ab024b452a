"""A small vision transformer whose FFNs are TriX, on images of stripes made on the
spot.

    python examples/vision_transformer.py

Four classes: the direction of the stripes. There are no tokens, so `router_input` is left
out and patches are routed by their hidden state. Under `train=True` the dropout of the
layer needs an rng, as any Linen dropout does.
"""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from trix_jax import SparseTriXFFN, routing

SIZE, PATCH, D, H, CLASSES = 16, 4, 48, 4, 4


class Block(nn.Module):
    """Computes `x += attention(norm(x))`, `x += ffn(norm(x))`; no mask."""

    @nn.compact
    def __call__(self, x_BLD, train: bool):
        x_BLD += nn.MultiHeadDotProductAttention(H)(nn.LayerNorm()(x_BLD))
        ffn = SparseTriXFFN(D, num_tiles=16, tiles_per_token=4, dropout=0.1)
        y_BLD, _, aux = ffn(nn.LayerNorm()(x_BLD), train)
        return x_BLD + y_BLD, aux["total_aux"]


class VisionTransformer(nn.Module):
    """Logits of the classes, and the sum of the blocks' auxiliary losses."""

    @nn.compact
    def __call__(self, images_BSS1, train: bool = False):
        x = nn.Conv(D, (PATCH, PATCH), strides=PATCH, name="patches")(images_BSS1)
        x_BLD = x.reshape(x.shape[0], -1, D)
        x_BLD += self.param("positions", nn.initializers.normal(0.02), x_BLD.shape[1:])[
            None
        ]
        total = jnp.zeros(())
        for _ in range(2):
            x_BLD, aux = Block()(x_BLD, train)
            total += aux
        return nn.Dense(CLASSES)(nn.LayerNorm()(x_BLD).mean(axis=1)), total


def stripes(key, count: int):
    """Noisy stripes at 0, 45, 90 or 135 degrees, of any phase and period."""
    kind, phase, period, noise = jax.random.split(key, 4)
    label = jax.random.randint(kind, (count,), 0, CLASSES)
    angle = label[:, None, None] * jnp.pi / CLASSES
    i, j = jnp.mgrid[:SIZE, :SIZE]
    along = i[None] * jnp.cos(angle) + j[None] * jnp.sin(angle)
    wave = jax.random.uniform(period, (count, 1, 1), minval=0.8, maxval=1.6) * along
    images = jnp.sin(wave + jax.random.uniform(phase, (count, 1, 1), maxval=6.28))
    images += jax.random.normal(noise, images.shape)
    return images[..., None], label


model = VisionTransformer()
optimizer = optax.adamw(2e-3)


@jax.jit
def step(params, state, opt_state, key):
    data_key, dropout_key = jax.random.split(key)
    images, labels = stripes(data_key, 64)

    def loss_fn(params):
        (logits, aux), new = model.apply(
            {"params": params, "routing": state},
            images,
            train=True,
            rngs={"dropout": dropout_key},
            mutable=["routing"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss + aux, new["routing"]

    grads, reported = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), routing.update(reported), opt_state


@jax.jit
def accuracy(variables):
    images, labels = stripes(jax.random.key(99), 512)
    return jnp.mean(model.apply(variables, images)[0].argmax(-1) == labels)


variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 1)))
params, state = variables["params"], variables["routing"]
opt_state = optimizer.init(params)
before = accuracy(variables)
for i in range(150):
    key = jax.random.fold_in(jax.random.key(1), i)
    params, state, opt_state = step(params, state, opt_state, key)
after = accuracy({"params": params, "routing": state})
print(f"accuracy on new images {before:.2f}, after training {after:.2f}")
assert after > 0.8
