"""`trix-jax` with a patch in it: the program of a process that makes one run.

python -m experiments.quality.patched NAME train ...
"""

import sys
from collections.abc import Sequence

from experiments.quality import patches
from trix_jax.cli.main import main as trix_jax


def main(argv: Sequence[str] | None = None) -> int:
    """Applies the patch NAME, for good, and returns the exit code of `trix-jax`."""
    name, *rest = sys.argv[1:] if argv is None else argv
    patches.apply(name)
    return trix_jax(rest)


if __name__ == "__main__":
    sys.exit(main())
