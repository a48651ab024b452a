"""Train steps compiled for eight GPUs that are not here: what they say to each other.

Needs the dependency group `aot`, as `tests/kernels/test_aot.py` does. Its packages are
put behind this environment's, which has the `lm` extra that theirs may lack.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib import util
from pathlib import Path

import pytest

from trix_kernels import aot

pytestmark = pytest.mark.slow

PYTHON = os.environ.get("TRIX_AOT_PYTHON")
STEPS = """
import json
from trix_jax.lm.compile import compile_step
from trix_jax.lm.parallel import Spread
from trix_jax.nn.transformer import TransformerConfig

model = TransformerConfig(
    vocab_size=64, context=32, d_model=32, n_layers=1, ffn="sparse", num_tiles=16
)
together = compile_step(model, "h100", 8, "shard_map")
spread = compile_step(model, "h100", 8, Spread(8))
print(json.dumps([together, spread]))
"""


@pytest.fixture
def environment(user_env):
    if PYTHON is None and util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the dependency group aot is not installed")
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run(
        [PYTHON or sys.executable, "-c", where],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(map(str, (root, root / "kernels", packages)))
    with tempfile.TemporaryDirectory() as folder:
        yield {**aot.environment(folder), **user_env, "PYTHONPATH": path}


def test_spread_tiles_compile_for_eight_gpus_and_talk_by_all_to_all(environment):
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together, spread = json.loads(done.stdout.splitlines()[-1])
    assert "all-to-all" not in together["collectives"]
    assert spread["collectives"]["all-to-all"] >= 4  # there and back, both passes
    assert spread["argument_bytes"] < together["argument_bytes"]
    print(json.dumps(spread))
