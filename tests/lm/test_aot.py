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

import jax
import pytest

from trix_jax.lm.aot import BATCH
from trix_jax.lm.config import TrainConfig
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state
from trix_jax.nn.transformer import TransformerConfig, TransformerLM
from trix_kernels import aot

pytestmark = pytest.mark.slow

TRAIN = TrainConfig(steps=1000)
PYTHON = os.environ.get("TRIX_AOT_PYTHON")
STEP = """
import json, sys
from trix_jax.lm.aot import compile_train_step
from trix_jax.lm.train.parallel import Spread
from trix_jax.nn.transformer import TransformerConfig

model = TransformerConfig(**json.loads(sys.argv[1]))
print(json.dumps(compile_train_step(model, "h100", 8, Spread(8))))
"""
MODEL = {
    "vocab_size": 64,
    "context": 32,
    "d_model": 32,
    "n_layers": 1,
    "ffn": "sparse",
    "num_tiles": 16,
}


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
        [sys.executable, "-c", STEP, json.dumps(MODEL)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["collectives"]["all-to-all"] >= 4  # there and back, both passes
    lm, optimizer = TransformerLM(TransformerConfig(**MODEL)), make_optimizer(TRAIN)
    state = jax.eval_shape(lambda: init_state(lm, optimizer, 0))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    tiles = 3 * 4 * 2 * 32 * 4 * 32  # weights and two moments, up and down, in bytes
    batch = 4 * BATCH * (MODEL["context"] + 1)
    assert found["argument_bytes"] == whole - tiles * 7 // 8 + batch
    print(json.dumps(found))


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_training_layer_has_no_loop_a_lean_router_and_little_memory(
    environment, target
):
    command = [sys.executable, "-m", "trix_jax.lm.aot", target, "training"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [row["tiles"] for row in rows] == [16, 64]
    for row in rows:
        print(json.dumps(row))
        assert row["while_loops"] == row["spill_bytes"] == 0
        assert not row["serialized"]
        assert 10 < row["routing_launches"] <= 25
        assert row["launches"] <= 70
        assert min(row["dense_modelled_us"], row["modelled_us"]) > 0
        assert row["kernels"] == (6 if target == "h100" else 0)
        if target == "h100":  # six products, and no copy of a tile's weights a block
            assert row["temporary_bytes"] <= 2**29
