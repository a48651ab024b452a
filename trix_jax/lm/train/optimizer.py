"""AdamW, or Muon for the FFN's matrices, with a schedule of the learning rate, clipping,
and a mask that says what is decayed.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trix_jax.lm.config import TrainConfig

MUON_RMS = 0.2  # of an update before the learning rate, as AdamW's are (Liu et al.)
PROJECTIONS = tuple(
    (name, "kernel") for name in ("up", "down", "tile_read", "tile_write")
)


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Computes the rate of update u, counted from 0, with W updates of warm-up, S steps
    and D of decay:

    `peak * (u + 1) / W` below W, then `peak` times
    - cosine: `f + (1 - f) * (1 + cos(pi * (u - W) / (S - W))) / 2`,
    - constant: 1,
    - wsd: 1 below S - D, then `1 - (1 - f) * (u - S + D) / D`, D at most S - W.

    f is `final_learning_rate`, which an update S would have; D is `decay_share` of S.

    References:
        Loshchilov and Hutter, 2017, "SGDR", https://arxiv.org/abs/1608.03983 (cosine).
        Hu et al., 2024, "MiniCPM", https://arxiv.org/abs/2404.06395 (WSD). Hägele et
        al., 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
        Durations", https://arxiv.org/abs/2405.18392 (a fifth of the steps to decay).
    """
    warmup = min(config.warmup_steps, config.steps)
    peak, last = config.learning_rate, config.learning_rate * config.final_learning_rate
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    constant = optax.constant_schedule(peak)
    match config.schedule:
        case "cosine":
            rest = max(config.steps - warmup, 1)
            parts, ends = [optax.cosine_decay_schedule(peak, rest, last / peak)], []
        case "constant":
            parts, ends = [constant], []
        case "wsd":
            begin = decay_begins(config)
            rest = max(config.steps - begin, 1)
            parts = [constant, optax.linear_schedule(peak, last, rest)]
            ends = [begin]
    if warmup:
        parts, ends = [lambda step: rise(step + 1), *parts], [warmup, *ends]
    return optax.join_schedules(parts, ends) if ends else parts[0]


def decay_begins(config: TrainConfig) -> int:
    """Updates of a "wsd" run before its rate begins to fall."""
    warmup = min(config.warmup_steps, config.steps)
    return max(warmup, config.steps - round(config.decay_share * config.steps))


def updates_done(opt_state: optax.OptState) -> Any:
    """How many updates an optimizer of `make_optimizer` has done: skipped steps are
    none.
    """
    return optax.tree.get(
        opt_state,
        "count",
        filtering=lambda path, _: path[-1].tuple_name == "ScaleByAdamState",
    )


def decay_mask(params) -> dict:
    """True for the matrices that weight decay shrinks: every leaf called `kernel`, but
    splines, and a learned router.
    """

    def is_decayed(path, _):
        names = [entry.key for entry in path]
        return names[-1] in ("kernel", "router") and "splines" not in names

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def clip(grads: Any, norm: Any, limit: float) -> Any:
    """Computes `grads * min(1, limit / norm)` of gradients whose global norm is known;
    0 does not clip.
    """
    if not limit:
        return grads
    return jax.tree.map(lambda g: jnp.where(norm < limit, g, (g / norm) * limit), grads)


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The optimizer of gradients that the step has clipped: only there all of them are
    known.

    References:
        Loshchilov and Hutter, 2019, "Decoupled Weight Decay Regularization",
        https://arxiv.org/abs/1711.05101. Liu et al., 2025, "Muon is Scalable for LLM
        Training", https://arxiv.org/abs/2502.16982 (updates of AdamW's size).
    """
    schedule, decay = learning_rate_schedule(config), _weight_decay(config)
    optimizer = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=decay,
        mask=decay_mask,
    )
    if config.optimizer == "muon":
        muon = optax.chain(
            optax.contrib.scale_by_muon(weight_dimension_numbers=_each_matrix),
            optax.stateless(_to_adamw_size),
            optax.add_decayed_weights(decay),
            optax.scale_by_learning_rate(schedule),
        )
        optimizer = optax.partition(
            {"muon": muon, "adamw": optimizer}, _optimizer_of_each
        )
    if config.ffn_rate_factor != 1:
        slow = functools.partial(_scale_projections, config.ffn_rate_factor)
        optimizer = optax.chain(optimizer, optax.stateless(slow))
    # The state has the place where clipping was, so that checkpoints keep their tree.
    return optax.chain(optax.identity(), optimizer) if config.clip else optimizer


def _weight_decay(config: TrainConfig) -> float | optax.Schedule:
    last = config.decay_until * config.steps
    if last >= config.steps:
        return config.weight_decay
    return lambda step: jnp.where(jnp.less(step, last), config.weight_decay, 0.0)


def _is_projection(path) -> bool:
    """Whether a parameter is a projection of an FFN, of tiles `[N, I, O]` or dense
    `[I, O]`.
    """
    return tuple(entry.key for entry in path)[-2:] in PROJECTIONS


def _optimizer_of_each(params):
    """Muon gets the projections of FFNs, AdamW everything else."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if _is_projection(path) else "adamw", params
    )


def _scale_projections(factor: float, updates, _):
    """Updates, and what decays, as of a rate that is `factor` times as large."""
    return jax.tree_util.tree_map_with_path(
        lambda path, u: factor * u if _is_projection(path) else u, updates
    )


def _each_matrix(params):
    """Every tile's matrix is orthogonalized by itself."""
    numbers = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda p: numbers(p.ndim - 2, p.ndim - 1), params)


def _to_adamw_size(updates, _):
    """Orthogonal `[I, O]` matrices have the RMS `1 / sqrt(max(I, O))`; gives them
    `MUON_RMS`.
    """
    return jax.tree.map(lambda u: u * (MUON_RMS * max(u.shape[-2:]) ** 0.5), updates)
