"""What layers keep between calls in decoding: the collection `"cache"`."""

from typing import Any

from flax import linen as nn


def keep(module: nn.Module, **values: Any) -> None:
    """Writes variables of a module's `"cache"`; while it is initialized they stay empty,
    as those of `nn.MultiHeadDotProductAttention` do.
    """
    if not module.is_initializing():
        for name, value in values.items():
            module.put_variable("cache", name, value)
