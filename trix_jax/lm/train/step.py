"""The train step: a pure per-device function that takes the name of the mapped axis as
an argument.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trix_jax import routing
from trix_jax.lm.config import TrainConfig
from trix_jax.lm.train.loss import cross_entropy, head_weights
from trix_jax.lm.train.optimizer import clip, learning_rate_schedule, updates_done
from trix_jax.lm.train.sharding import Layout
from trix_jax.made_once import ternary_once
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_jax.typing import Array, AxisName, Float, Int, Integer

AXIS = "data"


class TrainState(NamedTuple):
    """Everything that a step changes, and all that a checkpoint needs to go on.

    Attributes:
        step: steps done, skipped ones included: the position in the data.
        routing: the `"routing"` collection, `{}` for a dense model.
        rng: key data of the dropout key, which each step folds its number into.
    """

    step: Int[Array, "..."]
    params: Any
    opt_state: Any
    routing: Any
    rng: Integer[Array, "..."]


class Metrics(NamedTuple):
    """What a step reports, global over devices and micro-batches.

    Attributes:
        loss: cross-entropy, nats a token.
        entropy: of each layer's tile usage, nats; empty for a dense model.
        finite: whether loss and gradient were; if not, the update was skipped.
    """

    loss: Float[Array, "..."]
    grad_norm: Float[Array, "..."]
    learning_rate: Float[Array, "..."]
    aux_balance: Float[Array, "..."]
    aux_diversity: Float[Array, "..."]
    entropy: Float[Array, "..."]
    finite: Any


def init_state(
    model: TransformerLM, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
    """The state before the first step."""
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    variables = _compiled_init(model.config)(init_key)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        routing=variables.get("routing", {}),
        rng=jax.random.key_data(dropout_key),
    )


@lru_cache(maxsize=8)
def _compiled_init(config: TransformerConfig) -> Callable:
    model = TransformerLM(config)
    tokens = jnp.zeros((1, config.context), jnp.int32)
    return jax.jit(lambda key: model.init(key, tokens))


def make_train_step(
    model: TransformerLM,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    axis_name: AxisName | None = None,
    layout: Layout | None = None,
) -> Callable[
    [TrainState, Integer[Array, "accumulate B tokens"]], tuple[TrainState, Metrics]
]:
    """Builds the step for one device: `(state, batch) -> (state, metrics)`.

    The batch is `[accumulate, B, L + 1]`; gradients are averaged over micro-batches and
    over `axis_name`, routing counts are added, and one `routing.update` follows. Under
    a mapped axis the model's balance loss sees the load of all devices, so that the
    result is one device's up to the order of additions.

    With `layout` the state's parameters and moments are this device's parts.

    Where loss or gradient norm is not finite, on all devices alike, the new state is
    the old one but for its step number: parameters, optimizer and routing stay bit for
    bit.
    """
    if layout is not None and config.optimizer == "muon":
        raise NotImplementedError(
            "optimizer='muon' needs whole matrices: it does not go with sharded state or tiles."
        )
    tile_axis = layout.tile_axis if layout else None
    model = model.clone(axis_name=axis_name, tile_axis=tile_axis)
    schedule = learning_rate_schedule(config)
    norm = layout.norm if layout else optax.tree.norm

    def step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
        keys = _dropout_keys(state, batch.shape[0], axis_name)
        progress = state.step / config.steps
        made = _made_once(model, layout, progress, state, batch)
        losses = partial(_losses, model, layout, progress, made)
        routing_state, own = _over_micro_batches(losses, state, batch, keys)
        found = _over_devices(own, axis_name, layout)
        grad_norm = norm(found.grads)
        grads = clip(found.grads, grad_norm, config.clip)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.isfinite(found.loss) & jnp.isfinite(grad_norm)
        rate = schedule(updates_done(state.opt_state))
        metrics = _metrics(found, grad_norm, rate, finite)
        new = state._replace(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            routing=routing.update(
                routing_state, rate=config.balance_rate, axis_name=axis_name
            ),
        )
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        return kept._replace(step=state.step + 1), metrics

    return step


class Found(NamedTuple):
    """What a batch gives: means, and summed counts of assignments `[layers, N]`."""

    grads: Any
    loss: Float[Array, ""]
    aux: Any
    counts: Float[Array, "layers N"]


def _over_devices(own: Found, axis_name: AxisName | None, layout: Layout | None):
    """What all devices found, of what each did."""
    grads = layout.mean(own.grads) if layout else _mean(axis_name, own.grads)
    loss, aux = _mean(axis_name, (own.loss, own.aux))
    counts = jax.lax.psum(own.counts, axis_name) if axis_name else own.counts
    return Found(grads, loss, aux, counts)


def _metrics(found: Found, grad_norm: Array, rate: Any, finite: Any) -> Metrics:
    return Metrics(
        loss=found.loss,
        grad_norm=grad_norm,
        learning_rate=jnp.asarray(rate, jnp.float32),
        aux_balance=found.aux.get("balance", jnp.zeros(())),
        aux_diversity=found.aux.get("diversity", jnp.zeros(())),
        entropy=routing.usage_entropy(found.counts),
        finite=finite,
    )


def _made_once(model, layout, progress, state: TrainState, batch) -> dict:
    """The ternary weights of all micro-batches, where there are several and this device
    has whole matrices; sliced ones are gathered and made for each.
    """
    if batch.shape[0] == 1 or (layout is not None and layout.is_sliced):
        return {}
    variables = {"params": state.params, "routing": state.routing}
    return ternary_once(model, variables, batch[0, :, :-1], progress=progress)


def _losses(model, layout, progress, made, params, routing_state, tokens, key):
    """The loss of a micro-batch that is differentiated, and what else comes of it."""
    params = layout.gathered(params) if layout else params
    (hidden, infos, aux), mutated = model.apply(
        {"params": params, "routing": routing_state, **made},
        tokens[:, :-1],
        True,
        progress=progress,
        rngs={"dropout": key},
        mutable=["routing"],
        hidden=True,
    )
    head = head_weights(params, model.config)
    loss = cross_entropy(hidden, head, tokens[:, 1:]).mean()
    new_state = mutated.get("routing", {})
    return loss + aux["total_aux"], (loss, aux, _counts(infos), new_state)


def _over_micro_batches(losses, state: TrainState, batch, keys):
    """The routing state after all micro-batches, and what they gave together. Gradients
    are summed as they come: one copy of them, however many micro-batches there are.
    """

    def micro(carry, inputs):
        routing_state, total = carry
        (_, out), grads = jax.value_and_grad(losses, has_aux=True)(
            state.params, routing_state, *inputs
        )
        loss, aux, counts, routing_state = out
        return (routing_state, jax.tree.map(jnp.add, total, grads)), (loss, aux, counts)

    start = state.routing, jax.tree.map(jnp.zeros_like, state.params)
    carry, outputs = jax.lax.scan(micro, start, (batch, keys))
    grads = jax.tree.map(lambda x: x / batch.shape[0], carry[1])
    loss, aux = jax.tree.map(lambda x: x.mean(axis=0), outputs[:2])
    return carry[0], Found(grads, loss, aux, outputs[2].sum(axis=0))


def _dropout_keys(state: TrainState, count: int, axis_name: AxisName | None):
    """A key a micro-batch, of this step and device."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    if axis_name:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    return jax.random.split(key, count)


def _mean(axis_name: AxisName | None, tree):
    return jax.lax.pmean(tree, axis_name) if axis_name else tree


def _counts(infos):
    counts = [info.counts for info in infos if info is not None]
    return jnp.stack(counts) if counts else jnp.zeros((0, 1))
