"""Imports point one way: a table of rooms, floor over floor, and what the base install
lacks stays out of the layers.
"""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("trix_jax", "kernels", "tests", "examples", "experiments", "docs")

# The house, from the ground up. A room is a module or a package; it imports rooms of
# lower floors and itself, nothing of its own floor and nothing above.
FLOORS = {
    "kernels: packed two-bit matmuls": ("trix_kernels",),
    "ground: names of dimensions, whole files, one program, a share of training": (
        "trix_jax.typing",
        "trix_jax.files",
        "trix_jax.compiled",
        "trix_jax.progress",
    ),
    "core: arrays to arrays": (
        "trix_jax.ternary",
        "trix_jax.balance",
        "trix_jax.clusters",
        "trix_jax.labels",
        "trix_jax.hashing",
        "trix_jax.splines",
    ),
    "core: the seam to the kernels": ("trix_jax.ops",),
    "core: tokens to blocks and devices": (
        "trix_jax.dispatch",
        "trix_jax.expert_parallel",
    ),
    "core: an FFN of blocks": ("trix_jax.grouped_ffn",),
    "core: an FFN of sets of tiles": ("trix_jax.sets_ffn",),
    "core: tokens to signatures; the state that layers keep": (
        "trix_jax.matching",
        "trix_jax.routing_state",
    ),
    "core: tiles for tokens; trained to packed": (
        "trix_jax.routing",
        "trix_jax.frozen",
    ),
    "core: trained to ternary, once a step": ("trix_jax.made_once",),
    "layers": ("trix_jax.nn",),
    "other formats and frameworks": ("trix_jax.interop",),
    "lm: what a process and a model are": (
        "trix_jax.lm.accounting",
        "trix_jax.lm.hosts",
        "trix_jax.lm.signals",
        "trix_jax.lm.allocator",
    ),
    "lm: arrays and tokens on disk": ("trix_jax.lm.checkpoint", "trix_jax.lm.data"),
    "lm: settings; what counting achieves": ("trix_jax.lm.config", "trix_jax.lm.ngram"),
    "lm: presets and flags into settings": ("trix_jax.lm.presets",),
    "lm: a run": ("trix_jax.lm.train",),
    "lm: what is made of a run": (
        "trix_jax.lm.serve",
        "trix_jax.lm.report",
        "trix_jax.lm.bench",
        "trix_jax.lm.aot",
    ),
    "lm: many runs, a look inside, the main job": (
        "trix_jax.lm.experiment",
        "trix_jax.lm.inspect",
        "trix_jax.lm.demo",
    ),
    "the command line": ("trix_jax.cli",),
}
FLOOR_OF = {room: i for i, rooms in enumerate(FLOORS.values()) for room in rooms}
MAY_IMPORT_KERNELS = {
    "trix_kernels",
    "trix_jax.ops",
    "trix_jax.interop",
    "trix_jax.lm.aot",
    "trix_jax.lm.bench",
    "trix_jax.cli",
}
BASE = {room for room, floor in FLOOR_OF.items() if floor <= FLOOR_OF["trix_jax.nn"]}
BASE_PACKAGES = {
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "jaxtyping",
    "trix_jax",
    "trix_kernels",
}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}


def within(module: str, packages: set[str]) -> bool:
    """Whether `module` is one of `packages` or lies in one."""
    return any(
        module == package or module.startswith(f"{package}.") for package in packages
    )


@functools.cache
def room_of(name: str) -> str | None:
    """The room that a module, or a name in one, belongs to; None outside the house and
    for `trix_jax` itself, its face.
    """
    return next((room for room in FLOOR_OF if within(name, {room})), None)


def module_name(path: str) -> str:
    """The import name of a file, given relative to the repository's root."""
    parts = Path(path).with_suffix("").parts
    parts = parts[1:] if parts[:2] == ("kernels", "trix_kernels") else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(
    tree: ast.Module, module: str, is_package: bool
) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported at any depth; for `from a import b`
    both `a` and `a.b`.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                base = module.split(".")[: None if is_package else -1]
                base = base[: len(base) - node.level + 1] if node.level else []
                origin = ".".join([*base, *([node.module] if node.module else [])])
                yield node.lineno, origin
                yield from (
                    (node.lineno, f"{origin}.{alias.name}") for alias in node.names
                )
            case ast.Call(
                func=ast.Name(id=name) | ast.Attribute(attr=name),
                args=[ast.Constant(value=str(target)), *_],
            ):
                if name in ("import_module", "__import__", "importorskip"):
                    yield node.lineno, target


@functools.cache
def broken_rule(module: str, name: str) -> str | None:
    """Why `module` may not import `name`, or None if it may."""
    ours, top = module.startswith(("trix_jax", "trix_kernels")), name.split(".")[0]
    mine, theirs = room_of(module), room_of(name)
    is_core = mine in BASE or mine == "trix_jax.interop"
    rules = {
        "imports point down, floor over floor": (
            mine is not None
            and theirs not in (None, mine)
            and FLOOR_OF[mine] <= FLOOR_OF[theirs]
        ),
        "the house is entered by its rooms, not by its face": (
            is_core and top == "trix_jax" and theirs is None and name != "trix_jax"
        ),
        "kernels are reached through trix_jax.ops": (
            module.startswith("trix_jax")
            and top == "trix_kernels"
            and not within(module, MAY_IMPORT_KERNELS)
        ),
        "only lm/data imports grain": ours
        and top == "grain"
        and not within(module, {"trix_jax.lm.data"}),
        "only lm/checkpoint imports orbax": ours
        and top == "orbax"
        and not within(module, {"trix_jax.lm.checkpoint"}),
        "nothing else imports experiments": top == "experiments"
        and not within(module, {"experiments", "tests.experiments"}),
        "no pickle": top in PICKLES,
        "the base install has jax, flax, numpy and jaxtyping only": (
            within(module, BASE)
            and top not in BASE_PACKAGES
            and top not in sys.stdlib_module_names
        ),
    }
    return next((rule for rule, broken in rules.items() if broken), None)


def violations(path: str, source: str) -> list[str]:
    """The rules that a file breaks, as `path:line: rule (name)`."""
    tree, module = ast.parse(source), module_name(path)
    found = [
        f"{path}:{line}: {rule} ({name})"
        for line, name in imported(tree, module, Path(path).name == "__init__.py")
        if (rule := broken_rule(module, name))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{path}:{node.value.lineno}: no pickle (allow_pickle)")
    return found


@pytest.mark.parametrize(
    ("path", "source", "rule"),
    [
        (
            "kernels/trix_kernels/packing.py",
            "import trix_jax.ternary",
            "point down",
        ),
        ("trix_jax/routing.py", "from trix_jax import nn", "point down"),
        ("trix_jax/frozen.py", "def f():\n    from .lm import train", "point down"),
        ("trix_jax/nn/block.py", "from ..lm.config import Config", "point down"),
        ("trix_jax/nn/__init__.py", "from ..cli import main", "point down"),
        (
            "trix_jax/nn/linear.py",
            "from trix_kernels import packing",
            "through trix_jax.ops",
        ),
        ("trix_jax/lm/train/loop.py", "import trix_kernels", "through trix_jax.ops"),
        ("trix_jax/lm/train/loop.py", "import grain.python as grain", "only lm/data"),
        (
            "trix_jax/lm/train/loop.py",
            "from orbax.checkpoint import v1",
            "only lm/checkpoint",
        ),
        ("trix_jax/lm/report/run.py", "import experiments.quality", "experiments"),
        ("trix_jax/lm/data/store.py", "import pickle", "no pickle"),
        ("tests/test_x.py", "np.load(path, allow_pickle=True)", "no pickle"),
        ("trix_jax/nn/linear.py", "import optax", "base install"),
        ("trix_jax/matching.py", "from trix_jax import routing", "point down"),
        (
            "trix_jax/lm/data/store.py",
            "from trix_jax.lm import checkpoint",
            "point down",
        ),
        (
            "trix_jax/lm/train/loop.py",
            "from trix_jax.lm.serve import load",
            "point down",
        ),
        (
            "trix_jax/lm/report/run.py",
            "from trix_jax.lm.serve import load",
            "point down",
        ),
        ("trix_jax/nn/tiles.py", "from trix_jax import freeze", "by its face"),
        (
            "trix_jax/dispatch.py",
            "import importlib\nimportlib.import_module('rich')",
            "base install",
        ),
    ],
)
def test_violations_forbidden_import_is_named(path, source, rule):
    (*_, last) = violations(path, source)
    assert rule in last


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("trix_jax/ops.py", "from trix_kernels import packing"),
        ("trix_jax/lm/bench/layers.py", "import trix_kernels.packing"),
        ("trix_jax/lm/data/pipeline.py", "import grain.python as grain"),
        (
            "trix_jax/lm/checkpoint/checkpoint.py",
            "from orbax.checkpoint import v1 as ocp",
        ),
        (
            "trix_jax/nn/block.py",
            "from . import linear\nfrom ..routing import select\nimport jax.numpy as jnp",
        ),
        ("kernels/trix_kernels/aot.py", "import subprocess\nfrom . import packing"),
        (
            "trix_jax/lm/data/store.py",
            "np.load(path, mmap_mode='r', allow_pickle=False)",
        ),
    ],
)
def test_violations_allowed_import_passes(path, source):
    assert violations(path, source) == []


def test_every_module_has_a_room():
    found = {
        module_name(path.relative_to(ROOT).as_posix())
        for folder in ("trix_jax", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    }
    faces = {"trix_jax", "trix_jax.lm"}
    assert sorted(name for name in found - faces if room_of(name) is None) == []
    assert sorted(room for room in FLOOR_OF if room not in found) == []


def test_training_lane_has_at_most_twelve_files_flat():
    assert len(list((ROOT / "trix_jax" / "lm").glob("*.py"))) <= 12


def test_sources_follow_the_rules():
    files = [
        path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    names = {path.relative_to(ROOT).as_posix() for path in files}
    expected = {
        "trix_jax/__init__.py",
        "trix_jax/routing.py",
        "trix_jax/ops.py",
        "kernels/trix_kernels/packing.py",
    }
    assert expected <= names
    assert any(name.startswith("trix_jax/nn/") for name in names)
    assert any(name.startswith("trix_jax/lm/data/") for name in names)
    found = [
        line
        for path in files
        for line in violations(
            path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        )
    ]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_import_trix_jax_brings_nothing_of_the_lm_extra(user_env):
    """`import trix_jax` works on the base install: it loads no third-party package that
    jax and flax do not load.
    """
    script = (
        "import sys, jax, flax.linen, jaxtyping\n"
        "before = {name.split('.')[0] for name in sys.modules}\n"
        "import trix_jax\n"
        "new = {name.split('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)\n"
        "print(*sorted(new - {'trix_jax', 'trix_kernels'}), any(n.startswith('trix_jax.lm') for n in sys.modules))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=user_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False"]
