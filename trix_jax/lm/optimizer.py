"""AdamW with warm-up and cosine decay, clipping, and a mask that says what is decayed."""

import jax
import optax

from trix_jax.lm.config import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Linear from 0 to the peak over the warm-up, then cosine to `final_learning_rate` of it at the last step."""
    warmup = min(config.warmup_steps, config.steps)
    peak, last = config.learning_rate, config.learning_rate * config.final_learning_rate
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    fall = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1), last / peak)
    if warmup == 0:
        return fall
    return optax.join_schedules([lambda step: rise(step + 1), fall], [warmup])


def decay_mask(params) -> dict:
    """True for the matrices that weight decay shrinks: every leaf called `kernel`, but splines, and a learned router."""

    def is_decayed(path, _):
        names = [entry.key for entry in path]
        return names[-1] in ("kernel", "router") and "splines" not in names

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW.

    References:
        Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization", https://arxiv.org/abs/1711.05101.
    """
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    return (
        optax.chain(optax.clip_by_global_norm(config.clip), adamw)
        if config.clip
        else adamw
    )
