"""Nothing rots: every script of `examples/` runs to its end in a user's process; each
asserts what it shows.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
LAYERS = {
    "linear": "TriXLinear",
    "sparse_ffn": "SparseTriXFFN",
    "hierarchical_ffn": "HierarchicalTriXFFN",
    "lookup_ffn": "SparseLookupFFN",
}

SHORTENED = {"linen_transformer": ["50"], "dense_to_trix": ["40", "10"]}  # steps


def imports(script):
    tree = ast.parse(script.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_runs(script, user_env, tmp_path):
    command = [
        sys.executable,
        "-W",
        "error",
        str(script),
        *SHORTENED.get(script.stem, []),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=user_env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("name", LAYERS)
def test_layer_example_needs_nothing_but_jax_flax_and_us(name):
    script = next(script for script in SCRIPTS if script.stem == name)
    found = set(imports(script))
    assert f"trix_jax.{LAYERS[name]}" in found
    assert {module.split(".")[0] for module in found} <= {"jax", "flax", "trix_jax"}
