"""`TriXLinear`: a linear layer with ternary weights, output tiles and signatures."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from trix_jax import ops, routing
from trix_jax.nn import misuse
from trix_jax.nn.inputs import as_floats
from trix_jax.nn.kernel import TernaryKernel
from trix_jax.nn.settings import check_divides
from trix_jax.ops import PACKED
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import AnyArray, Array, Dtype, Float, Scalar, Shaped


class TriXLinear(nn.Module):
    """Computes `y_n = gate_n * ((x @ q_n) * scale_n) + bias_n` for the output tiles n,
    concatenated.

    Tile n is the n-th run of `features / num_tiles` outputs. The method
    `signatures` gives the tiles' addresses, for a router of your own.

    Attributes:
        features: O, the width of the output.
        num_tiles: N, a divisor of `features`.
        use_bias: adds a bias, an output each.
        ternary: see `TernaryConfig`; with rule "fixed" (the original's) scales are
            learned per output.
        kernel_init: of the latent weights `[N, I, features / N]`, called once a tile
            with `[I, features / N]`; None takes a normal distribution of variance 1 /
            I, or U(-0.8, 0.8) under the rule "fixed".
        bias_init: of the bias.
        dtype: of the computation; None takes the input's.
        param_dtype: of the parameters.

    Raises:
        ValueError: `num_tiles` does not divide `features`; a gate of another shape than
            `[..., N]`.

    References:
        TriX, https://github.com/anjaustin/trix.
    """

    features: int
    num_tiles: int = 4
    use_bias: bool = False
    ternary: TernaryConfig = TernaryConfig()
    kernel_init: Callable | None = None
    bias_init: Callable = nn.initializers.zeros
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Shaped[AnyArray, "..."],
        gate: Shaped[AnyArray, "..."] | None = None,
        *,
        progress: Scalar | None = None,
    ) -> Float[Array, "*B O"]:
        """Applies the layer.

        Args:
            x: input, at least rank 1; integers are promoted with the parameters.
            gate: multiplies each tile's outputs, 0 switching a tile off; None leaves
                all on.
            progress: share of training done, for `TernaryConfig` schedules; None is the
                end.
        """
        x = as_floats(x, self.param_dtype)
        n, width = (
            self.num_tiles,
            check_divides("features", self.features, "num_tiles", self.num_tiles),
        )
        gate = None if gate is None else jnp.asarray(gate)
        if gate is not None and gate.shape != (*x.shape[:-1], n):
            raise ValueError(
                f"gate must be {[*x.shape[:-1], n]}, a value a tile. Got {list(gate.shape)}."
            )
        kernel = self._kernel(x.shape[-1], width)(self._progress(progress))
        tokens = x.reshape(-1, x.shape[-1]).astype(self.dtype or x.dtype)
        y = ops.matmul(tokens, kernel, width, self.ternary.activations)
        y = y.reshape(*x.shape[:-1], n, width)
        y = (y if gate is None else y * gate[..., None].astype(y.dtype)).reshape(
            *x.shape[:-1], self.features
        )
        if self.use_bias:
            bias = self.param(
                "bias", self.bias_init, (self.features,), self.param_dtype
            )
            y = y + jnp.broadcast_to(bias, y.shape).astype(y.dtype)
        return y

    def _progress(self, progress: Scalar | None) -> Scalar:
        """The share of training done. A linear layer is not told whether it trains, so
        that a schedule without progress gets a warning.
        """
        frozen = self.scope is not None and PACKED in self.variables
        if progress is None and not (self.is_initializing() or frozen):
            if misuse.has_schedule(self.ternary):
                misuse.warn_of_missing_progress(self.ternary)
        return misuse.check_progress(progress, self.ternary, training=False)

    @nn.compact
    def signatures(
        self, in_features: int, kind: routing.Signature = "sum"
    ) -> Float[Array, "N I"]:
        """The address of each tile, read off its weights: the sum over its outputs,
        normalized as `routing.signatures` says.
        """
        width = self.features // self.num_tiles
        weights = ops.unpack(self._kernel(in_features, width)(), width)
        return routing.signatures(weights.q.sum(axis=-1), kind)

    def _kernel(self, in_features: int, width: int) -> TernaryKernel:
        shape = (self.num_tiles, in_features, width)
        return TernaryKernel(
            shape,
            self.ternary,
            self.kernel_init,
            param_dtype=self.param_dtype,
            name="kernel",
        )
