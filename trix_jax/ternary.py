"""Ternary weights with a straight-through gradient, their scales, and how training
becomes ternary.

Everything computes `w ~ q * scale` with `q` in {-1, 0, +1} and leaves the product to
the caller as `(x @ q) * scale`, in this order: then a frozen model, which has only `q`
and `scale`, agrees with the trained one bit for bit (`x @ (q * scale)` does not).

References:
    Ma et al., 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58
    Bits", https://arxiv.org/abs/2402.17764 (absmean). Li et al., 2016, "Ternary Weight
    Networks", https://arxiv.org/abs/1605.04711 (threshold). Bengio et al., 2013,
    "Estimating or Propagating Gradients Through Stochastic Neurons",
    https://arxiv.org/abs/1308.3432 (straight-through).
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from trix_jax.compiled import together
from trix_jax.progress import reached
from trix_jax.typing import Array, Float, Scalar

Mode = Literal["none", "ste", "soft", "progressive"]
Rule = Literal["absmean", "threshold", "fixed"]
Granularity = Literal["tile", "channel", "group"]
Activations = Literal["float", "int8"]

TERNARY = "ternary"  # the Flax collection of weights made once (`trix_jax.made_once`)
FIXED_CLIP = 1.5  # the original stops the gradient of its fixed rule beyond this weight


class Ternary(NamedTuple):
    """A matrix as `q * scale`.

    Attributes:
        q: weights in {-1, 0, +1} (real numbers while a soft mode is at work).
        scale: representable in bfloat16; one per group of the contraction and output,
            or broadcast over outputs.
    """

    q: Float[Array, "*N I O"]
    scale: Float[Array, "*N G S"]


@dataclasses.dataclass(frozen=True)
class TernaryConfig:
    """How weights become ternary.

    Attributes:
        mode: "ste" is ternary forward, straight-through backward. "none" leaves the
            weights as they are. "soft" is a smooth staircase, `(tanh((u - t) /
            temperature) + tanh((u + t) / temperature)) / 2` with `u = w / scale` and
            `t` the rule's threshold. "progressive" sharpens that staircase as training
            goes on and ends ternary.
        rule: "absmean" rounds `w / mean|w|`; "threshold" keeps `|w| > threshold *
            mean|w|` and scales by the mean of what it kept; "fixed" keeps `|w| >
            threshold` (the original's rule; its scale is learned by the layer).
        granularity: a scale per "tile" (matrix), per output "channel", or per "group"
            of the contraction and output.
        group_size: weights in a group; a contraction no longer than this is one group.
        activations: what meets the ternary weights, in training and frozen alike.
            "int8" rounds every token to integers at `max|x| / 127` first, with the
            gradient straight through (the BitNet recipe); sums are exact.
        threshold: None takes the rule's own: 0.7 for "threshold", 0.5 for "fixed".
        temperature: of the staircase, at the start of "progressive".
        final_temperature: the temperature at which "progressive" turns ternary.
        full_precision_fraction: share of training before which weights stay real ("ste"
            and "progressive").
        hard_fraction: share of training after which "progressive" is ternary.
    """

    mode: Mode = "ste"
    rule: Rule = "absmean"
    granularity: Granularity = "tile"
    group_size: int = 128
    activations: Activations = "float"
    threshold: float | None = None
    temperature: float = 0.5
    final_temperature: float = 0.05
    full_precision_fraction: float = 0.0
    hard_fraction: float = 0.8

    def __post_init__(self):
        for name, kind in (
            ("mode", Mode),
            ("rule", Rule),
            ("granularity", Granularity),
            ("activations", Activations),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(kind))}. Got {getattr(self, name)!r}."
                )
        if self.group_size < 128:
            raise ValueError(
                f"group_size must be at least 128 weights a scale. Got {self.group_size}."
            )
        self._check_schedule()
        if self.threshold is not None and (
            self.rule == "absmean" or self.threshold <= 0
        ):
            raise ValueError(
                f"threshold is positive and belongs to rules 'threshold' and 'fixed'. Got {self.threshold}."
            )

    def _check_schedule(self):
        """Each mode's own settings; it reads no others."""
        first, last = self.full_precision_fraction, self.hard_fraction
        if self.mode == "ste" and not 0 <= first <= 1:
            raise ValueError(f"full_precision_fraction must be in 0..1. Got {first}.")
        if self.mode == "soft" and self.temperature <= 0:
            raise ValueError(f"temperature must be positive. Got {self.temperature}.")
        if self.mode != "progressive":
            return
        if not 0 < self.final_temperature <= self.temperature:
            raise ValueError(
                "temperatures must satisfy 0 < final_temperature <= temperature. "
                f"Got {self.final_temperature} and {self.temperature}."
            )
        if not 0 <= first <= last <= 1:
            raise ValueError(
                "fractions must satisfy 0 <= full_precision_fraction <= hard_fraction <= 1. "
                f"Got {first} and {last}."
            )


def ternarize(
    w: Float[Array, "*N I O"],
    config: TernaryConfig = TernaryConfig(),
    progress: Scalar = 1.0,
) -> Ternary:
    """Computes `q = clip(round(w / scale), -1, 1)` and `scale = mean|w|`, or as
    `config` says otherwise.

    `dq/dw = 1 / scale` (straight-through), the scale takes no gradient, so the gradient
    of `(x @ q) * scale` with respect to `w` is that of `x @ w`.

    Args:
        w: latent weights, the contraction on the last axis but one.
        config: the rule and its options.
        progress: share of training that is done, 0 to 1; only schedules look at it. May
            be traced.

    Raises:
        ValueError: "group" granularity on a contraction that is not a multiple of
            `group_size`.
    """
    if config.mode == "none":
        return Ternary(w, jnp.ones((*w.shape[:-2], 1, 1), w.dtype))
    hard, scale, edge = _hard(w, config)
    if config.rule == "fixed":
        w = jnp.clip(w, -FIXED_CLIP, FIXED_CLIP)
    u = w / expand_scale(scale, w.shape[-2])
    q = straight_through(hard, u)
    if config.mode == "soft":
        q = _staircase(u, edge, config.temperature)
    elif config.mode == "progressive":
        first, last = config.full_precision_fraction, config.hard_fraction
        done = jnp.clip((progress - first) / max(last - first, 1e-6), 0, 1)
        temperature = (
            config.temperature * (config.final_temperature / config.temperature) ** done
        )
        q = jnp.where(reached(progress, last), q, _staircase(u, edge, temperature))
    if config.mode != "soft" and config.full_precision_fraction > 0:
        q = jnp.where(reached(progress, config.full_precision_fraction), q, u)
    return Ternary(q, scale)


def with_gradient(
    made: Ternary, w: Float[Array, "*N I O"], config: TernaryConfig
) -> Ternary:
    """Computes `ternarize(w, config)` of mode "ste" from its value `made`: from `w` comes
    the gradient alone.
    """
    if config.rule == "fixed":
        w = jnp.clip(w, -FIXED_CLIP, FIXED_CLIP)
    u = w / expand_scale(made.scale, w.shape[-2])
    return Ternary(straight_through(made.q.astype(w.dtype), u), made.scale)


def hard_ternary(
    w: Float[Array, "*N I O"], config: TernaryConfig = TernaryConfig()
) -> Ternary:
    """The ternary weights that training with `config` ends at, but for mode "soft",
    which ends between them: what `freeze` stores.

    Raises:
        ValueError: mode "none" has no ternary weights.
    """
    if config.mode == "none":
        raise ValueError(
            "mode='none' keeps real weights: there is nothing ternary to freeze."
        )
    q, scale, _ = _hard(w, config)
    return Ternary(q, scale)


def as_served(config: TernaryConfig) -> TernaryConfig:
    """The config whose weights are those that `freeze` stores, at any progress; real
    weights (mode "none") are served as they are.
    """
    if config.mode == "none":
        return config
    return dataclasses.replace(config, mode="ste", full_precision_fraction=0.0)


def is_as_served(config: TernaryConfig, progress: float) -> bool:
    """Whether training computes at `progress` with the weights that are served."""
    first = {
        "none": 0.0,
        "ste": config.full_precision_fraction,
        "progressive": config.hard_fraction,
        "soft": float("inf"),
    }
    return bool(reached(progress, first[config.mode]))


def expand_scale(
    scale: Float[Array, "*N G S"], contraction: int
) -> Float[Array, "*N I S"]:
    """Repeats every group's scale over its rows; a single group broadcasts as it is."""
    groups = scale.shape[-2]
    return scale if groups == 1 else jnp.repeat(scale, contraction // groups, axis=-2)


def whole(
    weights: Ternary, latent: Float[Array, "*N I O"] | None = None
) -> Float[Array, "*N I O"]:
    """Computes `q * scale`; exact in bfloat16 where `q` is ternary.

    Args:
        latent: the weights that these were made of, where `is_straight_through`. The
            gradient goes to them as it is, and not times `scale` and over `scale`.
    """
    w = weights.q * expand_scale(weights.scale, weights.q.shape[-2])
    return w if latent is None else straight_through(w, latent)


def is_straight_through(config: TernaryConfig) -> bool:
    """Whether the gradient of `q * scale` to the latent weights is 1 at any progress."""
    return config.mode == "ste" and config.rule != "fixed"


def round_scale(scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds to bfloat16 and stays float32. (A cast there and back may be optimized
    away; this is not.)
    """
    return jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)


def zero_fraction(q: Float[Array, "..."]) -> Float[Array, ""]:
    """Share of weights that are exactly zero."""
    return jnp.mean(q == 0)


def flip_rate(
    before: Float[Array, "..."], after: Float[Array, "..."]
) -> Float[Array, ""]:
    """Share of weights whose ternary value differs between two sets."""
    return jnp.mean(before != after)


@together("config")
def _hard(w, config: TernaryConfig):
    """Ternary weights, their rounded scale, and the threshold in units of the scale."""
    if config.rule == "fixed":
        edge = 0.5 if config.threshold is None else config.threshold
        ones = jnp.ones((*w.shape[:-2], 1, 1), w.dtype)
        q = jnp.sign(w) * (jnp.abs(w) > edge).astype(w.dtype)
        return jnp.where(jnp.isnan(w), w, q), ones, edge
    magnitude = jax.lax.stop_gradient(jnp.abs(w))
    absmean = _group_mean(magnitude, jnp.ones_like(magnitude), config)
    if config.rule == "absmean":
        scale = _as_scale(absmean, w.dtype)
        return (
            jnp.clip(jnp.round(w / expand_scale(scale, w.shape[-2])), -1, 1),
            scale,
            0.5,
        )
    threshold = 0.7 if config.threshold is None else config.threshold
    kept = magnitude > threshold * expand_scale(absmean, w.shape[-2])
    mean = _group_mean(magnitude, kept, config)  # without NaN, which are not kept
    scale = _as_scale(jnp.where(jnp.isnan(absmean), absmean, mean), w.dtype)
    edge = expand_scale(threshold * absmean / scale, w.shape[-2]).astype(w.dtype)
    return jnp.sign(w) * kept.astype(w.dtype), scale, edge


def _group_mean(values, weight, config: TernaryConfig):
    """Weighted mean of `values` over the weights that share a scale, `[..., G, 1 or
    O]`, in float32 or wider.
    """
    *lead, rows, columns = values.shape
    groups = 1
    if config.granularity == "group" and rows > config.group_size:
        if rows % config.group_size:
            raise ValueError(
                f"a contraction of {rows} weights must be a multiple of group_size={config.group_size}, or no longer."
            )
        groups = rows // config.group_size
    axes = (-2, -1) if config.granularity == "tile" else (-2,)
    shape = (*lead, groups, rows // groups, columns)
    wide = jnp.promote_types(values.dtype, jnp.float32)
    values, weight = values.astype(wide), weight.astype(wide)
    total = (values * weight).reshape(shape).sum(axes, keepdims=True)
    count = weight.reshape(shape).sum(axes, keepdims=True)
    return (total / jnp.maximum(count, 1)).squeeze(-2)


def _as_scale(mean, dtype):
    """Rounded; 1 where all weights are 0, and NaN where one is."""
    scale = round_scale(mean).astype(dtype)
    return jnp.where(scale == 0, 1, scale)


def _staircase(u, edge, temperature):
    return (jnp.tanh((u - edge) / temperature) + jnp.tanh((u + edge) / temperature)) / 2


@jax.custom_jvp
def straight_through(q, u):
    """The value of `q` with the gradient of `u`."""
    del u
    return q


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[1]  # itself, for second derivatives
