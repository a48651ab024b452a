"""The stricter world that tests live in; users never see it.

Before JAX starts: eight virtual CPU devices, and an error where arrays of different rank
would broadcast. On every import of ours: beartype checks the jaxtyping annotations of
each call.

Nearly all of the time is XLA compiling and Python starting. So code is compiled without
optimization, since it runs once or twice; what is compiled is kept in a folder that
lives as long as the session, for both workers and the processes that tests start; and
bytecode is written even where the environment forbids it.

What a user's process would see is another matter: a test that starts one passes the
`user_env` fixture to it.
"""

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

if "jax" in sys.modules:
    raise pytest.UsageError(
        "tests/conftest.py must run before jax is imported: a pytest plugin imported it first."
    )

sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A worker of pytest-xdist uses the folder of the process that started it.
_SESSION = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _SESSION = tempfile.TemporaryDirectory(prefix="trix-tests-")
_QUICK_ENV = {
    "JAX_COMPILATION_CACHE_DIR": _SESSION.name
    if _SESSION
    else os.environ["JAX_COMPILATION_CACHE_DIR"],
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
_STRICT_ENV = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "MPLBACKEND": "agg",
}
_EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"
_QUICKLY = (  # in one piece, since two workers fill the cores
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
)
# A worker inherits what the first process has set, hence taken out by name.
_USER_FLAGS = [
    flag
    for flag in os.environ.get("XLA_FLAGS", "").split()
    if flag not in (_EIGHT_DEVICES, *_QUICKLY)
]
# Every compilation frees MLIR's contexts: glibc then joins all small free pieces over and
# over, unless it keeps none of them apart (M_MXFAST): 3 to 8 % of a compilation.
if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(1, 0)
_USER_ENV = {k: v for k, v in os.environ.items() if k not in _STRICT_ENV} | _QUICK_ENV
_USER_ENV["XLA_FLAGS"] = " ".join([*_QUICKLY, *_USER_FLAGS])
os.environ.update(
    _STRICT_ENV | _QUICK_ENV, XLA_FLAGS=f"{_EIGHT_DEVICES} {_USER_ENV['XLA_FLAGS']}"
)

import hypothesis  # noqa: E402  the environment above must be there before anything imports jax
import jaxtyping  # noqa: E402

# Stays in force until the process ends. Traps: an annotation must be importable when
# the function is called, so names that only exist under TYPE_CHECKING fail; pytree
# dataclasses fail under tree.map, so states are NamedTuples.
jaxtyping.install_import_hook(["trix_jax", "trix_kernels"], "beartype.beartype")

# Compilation makes the first example of a JAX property slow, and its time says nothing
# about the property.
hypothesis.settings.register_profile(
    "trix",
    deadline=None,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "trix-ci", hypothesis.settings.get_profile("trix"), derandomize=True, database=None
)
hypothesis.settings.load_profile("trix-ci" if os.environ.get("CI") else "trix")


def pytest_collection_finish():
    """What JAX and the tests' modules are made of stays, so that the garbage collector
    need not look through it again at every trace: 6 % of the processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_unconfigure():
    if _SESSION:
        _SESSION.cleanup()


@pytest.fixture
def no_type_hook():
    """Switches the checks of annotations off: they would answer before our own
    ValueErrors do.
    """
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture
def user_env() -> dict[str, str]:
    """The environment for a subprocess that should run as a user's would: one CPU
    device, JAX's own defaults but for what makes tests quick.
    """
    return {**_USER_ENV, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}


# A small corpus, and a small run on it. Whatever imports the library does it inside:
# the kernels' tests do without.


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    words = "the tile that matches a token best is the tile that computes it".split()
    rows = (f"{words[i % 13]} {words[i * 7 % 13]} {i * i % 97}" for i in range(700))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="session")
def tiny_config(corpus):
    from trix_jax.lm.config import RunConfig, TrainConfig
    from trix_jax.lm.data import DataConfig
    from trix_jax.nn.transformer import TransformerConfig

    return RunConfig(
        arm="sparse",
        model=TransformerConfig(
            context=16,
            d_model=16,
            n_layers=1,
            n_heads=2,
            ffn="sparse",
            num_tiles=4,
            tiles_per_token=2,
        ),
        data=DataConfig(source="text", path=str(corpus), tokenizer="char"),
        train=TrainConfig(
            steps=10,
            batch_size=8,
            learning_rate=1e-2,
            warmup_steps=2,
            eval_every=5,
            rebuild_every=3,
        ),
    )


@pytest.fixture(scope="session")
def one_device():
    import jax

    return jax.devices()[:1]


@pytest.fixture(scope="session")
def run_dir(tiny_config, one_device, tmp_path_factory) -> Path:
    """A finished run of `tiny_config`; tests only read it."""
    from trix_jax.lm.train.loop import train

    directory = tmp_path_factory.mktemp("run") / "run"
    train(tiny_config, directory, devices=one_device, report=lambda _: None)
    return directory
