"""Balanced clusters of signatures, for hierarchical routing."""

import jax
import jax.numpy as jnp

from trix_jax.compiled import together
from trix_jax.typing import Array, Float, Int

EPSILON = 1e-6


@together()
def rms_unit(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Computes `x / sqrt(mean(x^2) + eps)` in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPSILON)


def balanced_kmeans(
    signature: Float[Array, "N D"], members: Int[Array, "C m"], iterations: int = 10
) -> Int[Array, "C m"]:
    """Clusters of equal size by cosine: in each round, the closest (tile, centroid)
    pairs are joined first while there is room.

    Returns:
        the tiles of each cluster, ascending.
    """
    count, size = members.shape
    tiles = rms_unit(signature)

    def assign(_, members):
        affinity = tiles @ rms_unit(tiles[members].mean(axis=1)).T

        def join(_, carry):
            affinity, home = carry
            tile, cluster = jnp.divmod(jnp.argmax(affinity), count)
            home = home.at[tile].set(cluster.astype(home.dtype))
            full = jnp.sum(home == cluster) == size
            affinity = affinity.at[tile].set(-jnp.inf)
            closed = full & (jnp.arange(count)[None] == cluster)
            return jnp.where(closed, -jnp.inf, affinity), home

        home = jnp.full((count * size,), -1, members.dtype)
        _, home = jax.lax.fori_loop(0, count * size, join, (affinity, home))
        return jnp.argsort(home, stable=True).astype(members.dtype).reshape(count, size)

    return jax.lax.fori_loop(0, iterations, assign, members)
