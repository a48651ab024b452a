"""What goes wrong in silence, said as a call is traced: once, with the argument's name
and what to write.
"""

import warnings
from collections.abc import Mapping

import jax
import numpy as np

from trix_jax.routing import RoutingConfig
from trix_jax.ternary import TernaryConfig
from trix_jax.typing import Scalar


def has_schedule(config: TernaryConfig) -> bool:
    """Whether training with this config depends on how far it is."""
    return config.mode == "progressive" or (
        config.mode == "ste" and config.full_precision_fraction > 0
    )


def check_progress(
    progress: Scalar | None, config: TernaryConfig, training: bool
) -> Scalar:
    """The share of training done; None is the end, 1.

    Raises:
        ValueError: training by a schedule without it, or a number outside 0..1.
    """
    if progress is None:
        if training and has_schedule(config):
            raise ValueError(
                "progress must be given in training to a layer whose TernaryConfig has "
                f"mode={config.mode!r}, full_precision_fraction={config.full_precision_fraction}: "
                "without it weights are ternary from the first step. "
                "Write progress=step / steps."
            )
        return 1.0
    return _check_share(progress)


def check_hold(progress: Scalar | None, config: RoutingConfig) -> Scalar:
    """The share of training done, in a training call of a layer that holds signatures.

    Raises:
        ValueError: it is needed and not given, or a number outside 0..1.
    """
    if progress is not None:
        return _check_share(progress)
    if config.holds_by_itself:
        raise ValueError(
            "progress must be given in training to a layer whose RoutingConfig has "
            f"hold_after={config.hold_after}: without it signatures are never held. "
            "Write progress=step / steps."
        )
    return 0.0


def _check_share(progress: Scalar) -> Scalar:
    is_known = not isinstance(progress, jax.core.Tracer)
    if is_known and not 0 <= float(np.asarray(progress)) <= 1:
        raise ValueError(
            f"progress must be a share of training, 0 to 1: step / steps. Got {progress}."
        )
    return progress


def check_state(state: Mapping[str, tuple[int, ...]], expected: int) -> None:
    """Refuses the state of many calls.

    Raises:
        ValueError: the bias is not that of `expected` tiles.
    """
    shape = state["bias"]
    if len(shape) == 1 and shape != (expected,):
        raise ValueError(
            f"the collection 'routing' must be of {expected} tiles. Got that of {shape[0]}."
        )
    if shape != (expected,):
        raise ValueError(
            f"the collection 'routing' must hold a bias of [{expected}]. Got {list(shape)}: "
            "the state of a layer under jax.vmap, a state an example. Give vmap an "
            "axis_name, write routing.reduce(state, axis_name) inside of it, and "
            "out_axes=None for the state."
        )


def check_clusters(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Refuses the clusters of other settings.

    Raises:
        ValueError: the members are not those of `expected`, clusters and tiles in each;
            () is none.
    """
    if shape != expected:
        raise ValueError(
            f"the collection 'routing' must have clusters of {list(expected)}. Got "
            f"{list(shape)}: the state of other settings."
        )


NO_STATE = (
    "variables must hold the collection 'routing', as `init` gives it and training "
    "returns it: a new one at every call has no balance. "
    "Write apply({'params': params, 'routing': state}, ...)."
)

NO_PLACE = (
    "the collection 'routing' must have a place at init: mutable there and, where the "
    "layer is lifted by nn.scan or nn.vmap, in variable_axes={'params': 0, 'routing': 0}."
)


def warn_of_training_without_state() -> None:
    """Warns of `train=True` while the collection `"routing"` is not mutable."""
    warnings.warn(
        "train=True without mutable=['routing']: the layer does not report its loads, "
        "so that they are never balanced. Write apply(..., train=True, "
        "mutable=['routing']) and give what it returns to routing.update, once a step.",
        stacklevel=2,
    )


def warn_of_missing_progress(config: TernaryConfig) -> None:
    """Warns of a schedule without progress where nothing tells training from
    evaluation.
    """
    warnings.warn(
        "progress is not given to a TriXLinear whose TernaryConfig has "
        f"mode={config.mode!r}, full_precision_fraction={config.full_precision_fraction}: its "
        "weights are ternary from the first step. Write progress=step / steps in "
        "training and progress=1.0 afterwards.",
        stacklevel=2,
    )
