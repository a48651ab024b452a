"""What XLA compiles for a verb, kept for the next one: JAX's compilation cache, in the
user's own cache folder.

It is machine code that JAX trusts, so the folder is the user's alone, and it never lies
in a run, which people pass on.
"""

import contextlib
import os
import stat
import sys
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

from trix_jax.files import cache_folder

FOLDER = "compilations"  # in `cache_folder()`
MAX_BYTES = 1 << 30  # beyond it JAX removes what was used least recently
STUMP_SECONDS = 60  # an entry without the time of its use is being written until then
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
        _remove_stumps(folder)
    except OSError as error:
        report(f"compilations are not kept for the next time: {error}")
        return None
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    environment.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(MAX_BYTES))
    environment.setdefault(
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", str(MIN_SECONDS)
    )
    return folder


def keep_nothing(environment: MutableMapping[str, str]) -> None:
    """Tells this process and those that it starts to keep no compilation; a folder that
    the user has set for JAX stays in use.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in environment:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"


def _make_private(folder: Path) -> None:
    """Makes the folder, for its owner alone, unless it is there, in one that nobody else
    can write.

    Raises:
        OSError: it cannot be made or written, or others have a right to it.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    for path, rights in ((folder, 0o077), (folder.parent, 0o022)):
        about = path.stat()
        if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & rights:
            raise PermissionError(
                f"{path} must be yours alone, since what lies there is run: chmod 700, or remove it."
            )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written.")


def _remove_stumps(folder: Path) -> None:
    """Removes entries that a process was killed in writing, which JAX would warn of and
    never mend: it writes their `-atime` last.
    """
    for entry in folder.glob("*-cache"):
        is_whole = entry.with_name(f"{entry.name[: -len('cache')]}atime").exists()
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if not is_whole and time.time() - entry.stat().st_mtime > STUMP_SECONDS:
                entry.unlink()
