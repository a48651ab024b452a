"""What XLA compiles for a verb, kept for the next one: JAX's compilation cache, in the
user's own cache folder.

It is machine code that JAX trusts, so the folder is the user's alone, and it never lies
in a run, which people pass on.
"""

import os
import stat
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path

from trix_jax.files import cache_folder

FOLDER = "compilations"  # in `cache_folder()`
MAX_BYTES = 1 << 30  # beyond it JAX removes what was used least recently
MIN_SECONDS = 0.1  # what compiles faster is not kept
# Those whose time is not compiling, or is measured, keep nothing.
VERBS = "demo train experiment eval generate export inspect".split()


def keep(
    environment: MutableMapping[str, str], report: Callable[[str], None]
) -> Path | None:
    """Tells JAX, which must not be imported yet, to keep what it compiles, by the
    variables of the environment that it reads; returns the folder.

    Nothing is changed (None) where JAX is there already, where the user has set
    JAX_COMPILATION_CACHE_DIR, or switched the cache off by
    JAX_ENABLE_COMPILATION_CACHE. A folder that cannot be written, or that others can, is
    told and not used.
    """
    ours = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"
    if "jax" in sys.modules or any(name in environment for name in ours):
        return None
    try:
        folder = cache_folder() / FOLDER
        _make_private(folder)
    except OSError as error:
        report(f"compilations are not kept for the next time: {error}")
        return None
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
    environment.setdefault(
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(MIN_SECONDS)
    )
    return folder


def _make_private(folder: Path) -> None:
    """Makes the folder, for its owner alone, unless it is there.

    Raises:
        OSError: it cannot be made or written, or others have a right to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = folder.stat()
    if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
        raise PermissionError(
            f"{folder} must be yours alone, since what lies there is run: chmod 700, or remove it."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written.")
