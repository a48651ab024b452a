"""What SECURITY.md says of this repository's own source and workflows."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("trix_jax", "kernels", "experiments")
    for path in (ROOT / folder).rglob("*.py")
)


def calls(tree):
    """Every call as its dotted name, and its keyword arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: k.value for k in node.keywords}


def test_source_runs_no_data():
    """Pickle is looked for by `test_imports.py`."""
    for path in SOURCES:
        for name, keywords in calls(ast.parse(path.read_text("utf-8"))):
            assert name not in ("eval", "exec", "compile", "os.system"), path
            assert not keywords.keys() & {"trust_remote_code", "shell"}, path
            if name in ("np.load", "numpy.load"):
                assert ast.unparse(keywords["allow_pickle"]) == "False", path
            if name == "torch.load":
                assert ast.unparse(keywords["weights_only"]) == "True", path


def test_only_the_command_line_turns_the_compilation_cache_on():
    """It is machine code that JAX trusts: the library leaves it to the user. What the
    command line does is held by `tests/cli/test_starting.py`; the GPU's measurement keeps
    its own in the folder that it writes.
    """
    names = "jax_compilation_cache", "set_cache_dir", "jax_persistent_cache"
    found = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if any(name in path.read_text("utf-8").lower() for name in names)
    ]
    measurement = "experiments/speed/gpu/__main__.py"
    assert sorted(found) == [measurement, "trix_jax/cli/compilations.py"]


def test_downloads_are_over_https():
    for path in SOURCES:
        assert "http://" not in path.read_text("utf-8"), path


@pytest.mark.parametrize(
    ("answer", "code", "sentence"),
    [
        ({"dependencies": [{"name": "a", "version": "1", "vulns": []}]}, 0, "0 with a"),
        (
            {
                "dependencies": [
                    {
                        "name": "a",
                        "version": "1",
                        "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}],
                    }
                ]
            },
            1,
            "a 1: CVE-1, mended in 2",
        ),
        (None, 0, "nothing was audited: no answer"),
    ],
)
def test_audit_fails_for_a_weakness_and_not_for_a_silent_service(
    tmp_path, answer, code, sentence
):
    stub = tmp_path / "pip_audit" / "__main__.py"
    stub.parent.mkdir()
    stub.write_text(f"import json\nprint(json.dumps({answer!r}))")
    if answer is None:
        stub.write_text("raise SystemExit('no answer')")
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "audit.py"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code
    assert sentence in done.stdout


def test_actions_are_pinned_by_commit_and_may_only_read():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        text = path.read_text("utf-8")
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
        used = re.findall(r"uses:\s*(\S+)", text)
        assert used
        for action in used:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", action), action
