"""A decoder-only Linen transformer in the style of nanodo, with TriX layers as FFNs.

    python examples/linen_transformer.py [STEPS]

The recommended configuration: eleven of 96 tiles a token, chosen by a hash of its id,
another in every layer, and a small real FFN beside them. Reads the source of Python's
own `argparse`, so nothing is downloaded. What a dense FFN does not ask for: ids go
through every block to the layer's routing, its auxiliary loss, averaged over the blocks,
is added, and the collection "routing" goes through the step beside the parameters.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from trix_jax import RoutingConfig, SparseTriXFFN, freeze, routing
from trix_jax.nn import DenseFFN

V, L, D, H, LAYERS = 128, 64, 64, 4, 2  # vocabulary (ASCII), length, width, heads


class Block(nn.Module):
    """Computes `x += attention(norm(x))`, `x += ffn(norm(x)) + shared(norm(x))`.

    Attributes:
        ffn: makes the FFN.
        shared_width: hidden width of the real FFN beside it; 0 is none.
    """

    ffn: Callable[[], nn.Module]
    shared_width: int = 0

    @nn.compact
    def __call__(self, x_BLD, ids_BL, train: bool):
        qkv = nn.DenseGeneral((3, H, D // H), use_bias=False)(nn.RMSNorm()(x_BLD))
        q_BLHE, k_BLHE, v_BLHE = jnp.moveaxis(qkv, -3, 0)
        y = jax.nn.dot_product_attention(q_BLHE, k_BLHE, v_BLHE, is_causal=True)
        x_BLD += nn.DenseGeneral(D, axis=(-2, -1), use_bias=False)(y)
        h_BLD = nn.RMSNorm()(x_BLD)
        y_BLD, _, aux = self.ffn()(h_BLD, train, token_ids=ids_BL)
        if self.shared_width:
            y_BLD += DenseFFN(D, width=self.shared_width, name="shared")(h_BLD)[0]
        return x_BLD + y_BLD, aux["total_aux"]


class Transformer(nn.Module):
    """Next-token logits, and the mean of the blocks' auxiliary losses.

    Attributes:
        ffn: makes a block's FFN.
        shared_width: see `Block`.
    """

    ffn: Callable[[], nn.Module]
    shared_width: int = 0

    @nn.compact
    def __call__(self, tokens_BL, train: bool = False):
        embed = nn.Embed(V, D, embedding_init=nn.initializers.normal(0.02))
        positions = self.param("positions", nn.initializers.normal(0.02), (L, D))
        x_BLD = embed(tokens_BL) + positions[None, : tokens_BL.shape[1]]
        losses = []
        for i in range(LAYERS):
            ids_BL = routing.layer_ids(tokens_BL, i, V)  # every layer hashes for itself
            x_BLD, aux = Block(self.ffn, self.shared_width)(x_BLD, ids_BL, train)
            losses.append(aux)
        return embed.attend(nn.RMSNorm()(x_BLD)), jnp.mean(jnp.stack(losses))


class State(NamedTuple):
    """What a step changes. `routing` is no parameter: the optimizer never sees it."""

    params: Any
    routing: Any
    opt_state: Any


def loss_of(logits_BLV, tokens_BL):
    return optax.softmax_cross_entropy_with_integer_labels(
        logits_BLV[:, :-1], tokens_BL[:, 1:]
    ).mean()


def make_step(model: nn.Module, optimizer: optax.GradientTransformation):
    """The step of a dense model but for three places."""

    @jax.jit
    def step(state: State, tokens_BL):
        def loss_fn(params):
            variables = {"params": params, "routing": state.routing}
            (logits, aux), new = model.apply(  # 1. the layers report what they did
                variables, tokens_BL, train=True, mutable=["routing"]
            )
            loss = loss_of(logits, tokens_BL)
            return loss + aux, (loss, new.get("routing", {}))  # 2. aux is added

        grads, (loss, reported) = jax.grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, routing.update(reported), opt_state), loss  # 3. it moves

    return step


def read_tokens():
    """Training and validation text, `[sequences, L]` each."""
    text = Path(argparse.__file__).read_bytes()
    tokens = jnp.array([byte for byte in text if byte < V], jnp.uint8)
    rows = tokens[: len(tokens) // L * L].reshape(-1, L).astype(jnp.int32)
    return rows[:-128], rows[-128:]


def train(model, variables, steps: int, peak: float = 3e-3, seed: int = 0):
    """Trains with AdamW on 16 random rows a step; returns the trained variables."""
    rows, _ = read_tokens()
    warmup = min(50, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0, peak, warmup, steps, peak / 10)
    optimizer = optax.adamw(schedule, weight_decay=0.0)
    step = make_step(model, optimizer)
    state = State(
        variables["params"],
        variables.get("routing", {}),
        optimizer.init(variables["params"]),
    )
    for i in range(steps):
        key = jax.random.fold_in(jax.random.key(seed), i)
        state, _ = step(state, jax.random.choice(key, rows, (16,)))
    return {"params": state.params, "routing": state.routing}


def evaluate(model, variables) -> float:
    """Mean loss on the validation rows, in nats a token."""
    _, rows = read_tokens()
    return float(jax.jit(lambda v: loss_of(model.apply(v, rows)[0], rows))(variables))


def make_ffn():
    by_hash = RoutingConfig(source="hash")
    return SparseTriXFFN(
        D, num_tiles=96, tiles_per_token=11, expansion=24, routing=by_hash
    )


def main(steps: int):
    model = Transformer(make_ffn, shared_width=D // 4)
    sample = jnp.zeros((1, L), jnp.int32)
    variables = jax.jit(model.init)(jax.random.key(1), sample)
    before = evaluate(model, variables)
    trained = train(model, variables, steps)
    after = evaluate(model, trained)
    print(f"validation loss {before:.3f}, after {steps} steps {after:.3f}")
    assert after < before
    packed = freeze(model, trained, sample)
    assert abs(evaluate(model, packed) - after) < 1e-5
    print("the same, packed to two bits a weight")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 400)
