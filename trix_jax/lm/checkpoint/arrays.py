"""The leaves of a checkpoint: what is stored of each, how it is told in words, and
where it goes when it comes back.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_NUMBERS = {"bool": bool, "int": int, "float": float}


def name_of(key: tuple) -> str:
    """A path in a tree, its names joined by "/"."""
    return jax.tree_util.keystr(key, simple=True, separator="/")


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float) and not isinstance(leaf, np.generic)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def to_stored(state: Any) -> tuple[Any, dict[str, str]]:
    """The pytree for Orbax, of numpy arrays and Python numbers, and the description of
    every leaf by its path.

    An array of which devices have parts stays as it lies: Orbax writes part by part, and
    each process its own.
    """
    named, treedef = jax.tree_util.tree_flatten_with_path(state)
    stored = [_to_orbax(name_of(key), leaf) for key, leaf in named]
    leaves = {name_of(key): describe(leaf) for key, leaf in named}
    if not leaves:
        raise ValueError("state must have at least one leaf.")
    if any(name_of(key).count("/") >= max(len(key), 1) for key, _ in named):
        raise ValueError(f"state must have no '/' in a key, got {list(leaves)}.")
    # Orbax joins paths with dots and stores {"a.b": x, "a": {"b": y}} as one array,
    # silently.
    if len({name.replace("/", ".") for name in leaves}) < len(named):
        raise ValueError(f"state has two leaves of one dotted path in {list(leaves)}.")
    return treedef.unflatten(stored), leaves


def _to_orbax(name: str, leaf: Any) -> Any:
    if _is_number(leaf):
        if isinstance(leaf, int) and not -(2**63) <= leaf < 2**63:
            raise ValueError(f"state leaf {name} must fit 64 bits, got {leaf}.")
        return leaf
    is_key = isinstance(leaf, jax.Array) and _is_key(leaf)
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    if not is_key and not (is_array and leaf.dtype.kind not in "OSUMm"):
        rule = "must be an array of numbers, a PRNG key or a number"
        raise TypeError(f"state leaf {name} {rule}, got {type(leaf).__name__}.")
    if not leaf.size:
        return None
    leaf = jax.random.key_data(leaf) if is_key else leaf
    is_whole = not isinstance(leaf, jax.Array) or leaf.is_fully_replicated
    return np.asarray(leaf) if is_whole else leaf


def describe(leaf: Any) -> str:
    """`float32[3,4]`, `key<fry>[]`, `int`: as it stands in leaves.json and in the
    messages.
    """
    if _is_number(leaf) or not hasattr(leaf, "dtype"):
        return type(leaf).__name__
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.partition("[")[2][:-1].split(",") if n)


def kind_of(text: str) -> type | None:
    """What Orbax is asked for; leaves.json has the shapes, and zero-sized arrays were
    not stored.
    """
    return _NUMBERS.get(text) or (None if 0 in _shape(text) else np.ndarray)


def kinds_in(metadata: Any) -> Any:
    """The same for a whole tree, from what Orbax notes of its leaves."""
    return jax.tree.map(
        lambda leaf: np.ndarray if hasattr(leaf, "shape") else type(leaf), metadata
    )


def nbytes(leaf: Any) -> int:
    """Bytes of an array, wherever its parts are, or of a number."""
    return np.asarray(leaf).nbytes if _is_number(leaf) else leaf.nbytes


def empty(text: str) -> np.ndarray:
    """An array of zeros that has a description: all there is of one without elements,
    which was not stored.
    """
    return np.zeros(_shape(text), jnp.dtype(text.partition("[")[0]))


def place(leaf: Any, value: Any) -> Any:
    """`value` as Orbax returned it, made the kind of leaf that `leaf` of the template
    is.
    """
    if _is_number(leaf):
        return value
    if isinstance(leaf, np.ndarray | np.generic):
        value = np.zeros(leaf.shape, leaf.dtype) if value is None else value
        return value[()] if isinstance(leaf, np.generic) else value
    if value is None:
        value = jnp.empty(leaf.shape, leaf.dtype)
    elif _is_key(leaf):
        value = jax.random.wrap_key_data(jnp.array(value), impl=leaf.dtype)
    else:
        value = jnp.array(value)
    if value.dtype != leaf.dtype:
        raise ValueError(f"A leaf of {leaf.dtype} needs jax_enable_x64.")
    # A committed array clashes with a mesh of other devices: nothing gets committed
    # that was not.
    stays = isinstance(leaf, jax.Array) and not leaf.committed
    return value if stays or not leaf.sharding else jax.device_put(value, leaf.sharding)


def difference(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs between two sets of descriptions by name, a line a leaf, the first
    ten.
    """
    names = sorted(n for n in expected | found if expected.get(n) != found.get(n))
    lines = [
        f"{n}: expected {expected.get(n, 'nothing')}, found {found.get(n, 'nothing')}"
        for n in names
    ]
    return lines if len(lines) <= 10 else [*lines[:10], f"and {len(lines) - 10} more"]


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `name_of` for a whole tree of dicts."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        here = nested
        for key in parents:
            here = here.setdefault(key, {})
        here[last] = value
    return nested
