"""How far training is, as a share of it."""

from typing import Any

import jax

ROUNDINGS = 2.0**-22  # of `step / steps` in float32: two


def reached(progress: jax.Array | float, share: float) -> Any:
    """Whether `share` of training is done: `progress >= share`, but for float32.

    Compiled, `step / 100` is `step * float32(1 / 100)`, and 30 steps come out below 0.3: a
    step late for many round numbers. So `progress` may be a four-millionth short of it,
    which is less than a step of up to four million.
    """
    return progress >= share * (1 - ROUNDINGS)
