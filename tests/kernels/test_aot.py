"""Every kernel compiled for GPUs that are not here, against the committed table.

Needs the dependency group `aot`. TRIX_AOT_PYTHON names a Python that has it (CI makes
one, and there the test fails where it is missing); without it, this one must have it.

    TRIX_AOT_PYTHON=... pytest -m slow tests/kernels/test_aot.py

A change that means to move the table writes it anew: `TRIX_AOT_WRITE=1` with the same
command.
"""

import functools
import json
import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TABLE = Path(__file__).resolve().parents[2] / "kernels" / "resources.json"
KEPT = (
    "name",
    "registers",
    "spill_bytes",
    "smem_bytes",
    "serialized",
    "decode_instructions_per_weight",
)
MODELLED = (
    "bytes_moved",
    "bytes_minimum",
    "modelled_us",
    "roofline_us",
)  # see kernels/README.md
PYTHON = os.environ.get("TRIX_AOT_PYTHON")
TARGETS = ("h100", "b200")

XLA_ON_THOR = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from trix_jax import SparseTriXFFN, TernaryConfig, freeze
from trix_kernels.gpu_specs import GPUS, target_config

topology = topologies.get_topology_desc(
    platform="cuda", target_config=target_config(GPUS["thor"]), topology="1x1x1"
)
sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("d",)), PartitionSpec())
place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
for activations in ("float", "int8"):
    config = TernaryConfig(activations=activations)
    layer = SparseTriXFFN(128, ternary=config, dtype=jnp.bfloat16)
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    frozen = jax.eval_shape(lambda v, x: freeze(layer, v, x), variables, x)
    for state in (variables, frozen):
        args = jax.tree.map(place, (state, x))
        compiled = jax.jit(layer.apply).lower(*args).compile()
        print("compiled", len(compiled.as_text()) > 1000)
"""

GRADIENT_ON_HOPPER = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from trix_kernels import device, grouped_matmul
from trix_kernels.gpu_specs import GPUS, target_config

device.unsupported_reason, device.arch = lambda: None, lambda: "sm_90a"
topology = topologies.get_topology_desc(
    platform="cuda", target_config=target_config(GPUS["h100"]), topology="1x1x1"
)
mesh = topologies.make_mesh(topology, (1,), ("d",))
shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(
    s, dtype, sharding=NamedSharding(mesh, P())
)

def loss(x, up, down, tile, filled):
    how = {"implementation": "mosaic_gpu"}
    h = jax.nn.relu(grouped_matmul(x, up, tile, filled, **how))
    y = grouped_matmul(h, down, tile, filled, **how)
    return jnp.sum(y.astype(jnp.float32) ** 2)

gradients = lambda *args: jax.grad(loss, (0, 1, 2))(*args)
rows = P("d")
shared = jax.shard_map(
    gradients, mesh=mesh, in_specs=(rows, P(), P(), rows, rows), out_specs=(rows, P(), P())
)
index = shape(575, dtype=jnp.int32)
args = shape(575, 128, 1024, dtype=jnp.bfloat16), shape(64, 1024, 256), shape(64, 256, 1024)
for function in (gradients, shared):
    compiled = jax.jit(function).lower(*args, index, index).compile()
    text = compiled.as_text()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    print(text.count('custom_call_target="mosaic_gpu'), text.count(" while("), temporaries)
"""


@pytest.fixture(scope="module")
def python():
    if PYTHON is None and util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("the dependency group aot is not installed")
    return PYTHON or sys.executable


def run(python, *args):
    # Paths of this checkout first: the other Python may have no trix_jax of its own.
    root = TABLE.parents[1]
    env = os.environ | {
        "PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}",
        "JAX_PLATFORMS": "cpu",
    }
    env.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [python, *args], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@functools.cache
def report(python, target):
    """What `trix_kernels.aot.report` finds for a target."""
    code = f"import json; from trix_kernels.aot import report; print(json.dumps(report({target!r})))"
    return json.loads(run(python, "-c", code).splitlines()[-1])


def table_of(name, found):
    """The committed list of that name; `found`, written there, if that was asked for."""
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if os.environ.get("TRIX_AOT_WRITE"):
        table[name] = found
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    return table[name]


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_as_the_table_says(python, target):
    kernels = report(python, target)["kernels"]
    for key in MODELLED:
        assert all(kernel[key] > 0 for kernel in kernels), key
    found = [{key: kernel[key] for key in KEPT} for kernel in kernels]
    assert found == table_of(target, found)
    assert all(kernel["spill_bytes"] == 0 for kernel in found)
    # Found on an H100: 128 rows of bfloat16 were, and took 1.7 times as long.
    assert not any(kernel["serialized"] for kernel in found)
    assert max(k["decode_instructions_per_weight"] for k in found) <= 2.0


def test_the_six_products_of_a_training_step_compile_as_the_table_says(python):
    products = report(python, "h100")["grouped"]
    found = [{key: product[key] for key in KEPT[:-1]} for product in products]
    assert found == table_of("h100 grouped", found)
    assert len(found) == 12
    assert all(product["spill_bytes"] == 0 for product in found)
    assert not any(product["serialized"] for product in found)
    assert max(product["smem_bytes"] for product in found) <= 227 * 1024


def test_blackwell_compiles_no_grouped_product(python):
    assert "grouped" not in report(python, "b200")


def test_the_layers_compile_for_a_gpu_without_our_kernels(python):
    # In training and frozen, with float and with int8 activations.
    assert run(python, "-c", XLA_ON_THOR).split() == 4 * ["compiled", "True"]


def test_an_ffns_gradient_is_six_kernels_without_a_loop_in_a_shard_map_too(python):
    for line in run(python, "-c", GRADIENT_ON_HOPPER).splitlines():
        kernels, loops, temporaries = map(int, line.split())
        assert (kernels, loops) == (6, 0)
        assert temporaries <= 128 * 2**20
