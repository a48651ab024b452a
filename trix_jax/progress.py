"""How far training is, as a share of it."""

from trix_jax.typing import Array, Bool, Scalar

ROUNDINGS = 2.0**-22  # of `step / steps` in float32: two


def reached(progress: Scalar, share: float) -> Bool[Array, ""] | bool:
    """Whether `share` of training is done: `progress >= share`, but for float32.

    Compiled, `step / 100` is `step * float32(1 / 100)`, and 30 steps come out below 0.3: a
    step late for many round numbers. So `progress` may be a four-millionth short of it,
    which is less than a step of up to four million.
    """
    return progress >= share * (1 - ROUNDINGS)
