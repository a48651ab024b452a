"""The console script `trix-jax`: a verb a file, each a thin call into the library."""

from trix_jax.cli.main import main as main
