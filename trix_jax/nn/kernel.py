"""A parameter that is ternary: `TernaryKernel`, the only place where layers meet latent
weights or packed ones.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from trix_jax import ops
from trix_jax.nn import misuse
from trix_jax.ops import PACKED
from trix_jax.ternary import (
    TERNARY,
    Ternary,
    TernaryConfig,
    hard_ternary,
    is_straight_through,
    round_scale,
    ternarize,
    with_gradient,
)
from trix_jax.typing import Array, Dtype, Float, Scalar


def tile_init(scale: float = 1.0) -> Callable:
    """`variance_scaling(scale, "fan_in", "normal")` of one tile's matrix, for kernels
    `[..., N, I, O]`.
    """

    def init(key, shape, dtype=jnp.float32):
        return jax.random.normal(key, shape, dtype) * (scale / shape[-2]) ** 0.5

    return init


def uniform_init(key, shape, dtype=jnp.float32):
    """U(-0.8, 0.8), the original's: its fixed threshold of 0.5 turns anything much
    smaller into zeros.
    """
    return jax.random.uniform(key, shape, dtype, -0.8, 0.8)


@dataclasses.dataclass(frozen=True)
class Whole:
    """An initializer that draws all tiles in one call, `[..., N, I, O]`, as the
    library's own do. Others are called once a tile.
    """

    init: Callable

    def __call__(self, key, shape, dtype=jnp.float32):
        """Draws a kernel."""
        return self.init(key, shape, dtype)


def per_tile(init: Callable) -> Callable:
    """An initializer of `[..., N, I, O]` that calls `init` with `[I, O]` and a key of
    its own for each tile. A box that `init` puts around its array comes back around the
    whole, with the names it has.
    """

    def draw(key, shape, dtype=jnp.float32):
        *lead, rows, columns = shape
        keys = jax.random.split(key, math.prod(lead))
        tiles = jax.vmap(lambda k: init(k, (rows, columns), dtype))(keys)
        return jax.tree.map(lambda leaf: leaf.reshape(shape), tiles)

    return draw


class TernaryKernel(nn.Module):
    """Weights `q * scale`, from a latent parameter `kernel` or, in a frozen model, from
    the `"packed"` collection. Where the collection `"ternary"` has what they are, only
    their gradient comes from the latent ones.

    Attributes:
        shape: of the kernel, `[..., N, I, O]`.
        config: how the kernel becomes ternary.
        kernel_init: called once a tile with `[I, O]`, unless it is `Whole`; None takes
            `tile_init()`, or `uniform_init` under the rule "fixed".
        learn_scale: under the rule "fixed", whose scale nothing else sets, adds a
            parameter `scale` per output.
        by_row: whether rows of a kernel `[I, O]` are looked up one at a time, so that
            it is packed in rows on every device.
    """

    shape: tuple[int, ...]
    config: TernaryConfig = TernaryConfig()
    kernel_init: Callable | None = None
    learn_scale: bool = True
    param_dtype: Dtype = jnp.float32
    by_row: bool = False

    @nn.compact
    def __call__(self, progress: Scalar = 1.0) -> ops.Weights:
        if self.has_variable(PACKED, "bits"):
            found = (self.get_variable(PACKED, n) for n in ops.Packed._fields)
            packed = ops.Packed(*map(jnp.asarray, nn.unbox(tuple(found))))
            self._check_packed(packed)
            return packed
        fixed = self.config.rule == "fixed"
        self._check_there_are_weights()
        init = self.kernel_init or Whole(uniform_init if fixed else tile_init())
        if len(self.shape) > 2 and not isinstance(init, Whole):
            init = per_tile(init)
        kernel = self.param("kernel", init, self.shape, self.param_dtype)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        weights = self._ternary(kernel.astype(wide), progress)
        return (
            weights._replace(scale=self._scale() * weights.scale)
            if fixed and self.learn_scale
            else weights
        )

    def _ternary(self, latent: Float[Array, "..."], progress: Scalar) -> Ternary:
        if not self.has_variable(TERNARY, "q"):
            return ternarize(latent, self.config, progress)
        made = Ternary(*(self.get_variable(TERNARY, n) for n in Ternary._fields))
        return with_gradient(made, latent, self.config)

    def ternary_once(self, params: dict, progress: Scalar | None) -> dict:
        """What several calls with these parameters may share: see `trix_jax.made_once`."""
        config = self.config
        if config.mode != "ste":
            return {}
        done = misuse.check_progress(progress, config, training=True)
        kernel = jnp.asarray(params["kernel"], jnp.float32)
        q, scale = jax.lax.stop_gradient(ternarize(kernel, config, done))
        if config.full_precision_fraction > 0:
            return {"q": q, "scale": scale}
        # int8 has no NaN; the scale has, under the rule "fixed" by this line alone.
        is_lost = jnp.isnan(q).any(axis=(-2, -1), keepdims=True)
        return {"q": q.astype(jnp.int8), "scale": jnp.where(is_lost, jnp.nan, scale)}

    def latent(self) -> Float[Array, "..."] | None:
        """The parameter in float32 or wider, where gradients of `q * scale` go to it as they are;
        None where they do not, and in a frozen model.
        """
        is_frozen = not self.has_variable("params", "kernel")
        if is_frozen or not is_straight_through(self.config):
            return None
        kernel = nn.unbox(self.get_variable("params", "kernel"))
        return kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))

    def pack_ternary(self, params: dict, packed: dict) -> dict:
        """The kernel in two bits; leading axes (scanned layers) pass through.

        Raises:
            ValueError: the mode is "none", or a weight is not finite.
        """
        del packed
        self._check_finite(params)
        weights = hard_ternary(jnp.asarray(params["kernel"], jnp.float32), self.config)
        if "scale" in params:
            weights = Ternary(weights.q, round_scale(params["scale"]))
        return ops.pack(weights, self.by_row)._asdict()

    def _check_finite(self, params):
        """Refuses NaN and infinity, of which two bits keep nothing; under `jit` nobody can
        tell.
        """
        for name, leaf in params.items():
            if isinstance(leaf, jax.core.Tracer):
                continue
            if bad := int((~jnp.isfinite(leaf)).sum()):
                raise ValueError(
                    f"params/{'/'.join(self.path)}/{name} must be finite to be frozen. "
                    f"Got {bad} of {jnp.size(leaf)} numbers that are NaN or infinite."
                )

    def _check_packed(self, packed):
        """Refuses the words of a kernel of another shape: a cut of them would fit. Widths
        that share their last word of four are not told apart.
        """
        got, layout = packed.bits.shape, ops.layout_of(packed)
        padded = (*self.shape[:-1], 4 * -(-self.shape[-1] // 4))  # of `widen`
        shapes = [ops.packed_shape(shape, layout) for shape in (self.shape, padded)]
        if got not in shapes or packed.scale.shape[-1] not in (1, self.shape[-1]):
            raise ValueError(
                f"packed/{'/'.join(self.path)}/bits must be {list(shapes[0])}, for a "
                f"kernel of {list(self.shape)}. Got {list(got)}: frozen with other settings."
            )

    def _check_there_are_weights(self):
        """Says where frozen variables have lost their packed half."""
        if self.is_initializing() or self.has_variable("params", "kernel"):
            return
        place = "/".join(self.path)
        raise ValueError(
            f"variables must hold params/{place}/kernel or, frozen, packed/{place}/bits. "
            "Under nn.scan or nn.vmap write variable_axes={'params': 0, 'routing': 0, "
            "'packed': 0}."
        )

    def _scale(self):
        # sqrt of the share of weights beyond the threshold, times the contraction:
        # outputs start at the input's RMS.
        shape = (*self.shape[:-2], 1, self.shape[-1])
        start = (0.375 * self.shape[-2]) ** -0.5
        return round_scale(
            self.param(
                "scale", nn.initializers.constant(start), shape, self.param_dtype
            )
        )
