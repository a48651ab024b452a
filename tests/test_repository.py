"""What must hold for the files of the repository, whatever they say."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 400  # a file that needs more has two subjects

# Registries are the reader's choice, and paths of one machine are nobody else's.
REGISTRY_HOSTS = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs|deb\.debian")
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|root)/")


def repository_files() -> list[Path]:
    """Files that are tracked or about to be: what git lists and does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return sorted({path for name in names if name and (path := ROOT / name).is_file()})


def text_of(path: Path) -> str | None:
    """The text of a file, or None if it is binary."""
    data = path.read_bytes()
    return None if b"\0" in data else data.decode("utf-8")


def locked() -> dict[str, tuple[str, str]]:
    """Name to (version, the whole entry) for each package of requirements.lock."""
    text = (ROOT / "requirements.lock").read_text("utf-8").replace("\\\n", " ")
    entries = re.findall(
        r"^([A-Za-z0-9._-]+)==([^\s;]+)(.*)$", text, flags=re.MULTILINE
    )
    return {canonicalize_name(name): (version, rest) for name, version, rest in entries}


def test_python_files_stay_under_400_lines():
    files = [path for path in repository_files() if path.suffix == ".py"]
    assert len(files) > 10
    long = {
        str(path.relative_to(ROOT)): n
        for path in files
        if (n := path.read_text("utf-8").count("\n")) > MAX_LINES
    }
    assert not long


def test_text_files_name_no_registry_and_no_machine_path():
    found = []
    for path in repository_files():
        for number, line in enumerate((text_of(path) or "").splitlines(), start=1):
            if match := REGISTRY_HOSTS.search(line) or MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n".join(found)


def test_tests_have_no_init_files():
    """With one, pytest's importlib mode resolves a sub-folder's tests against the wrong
    package.
    """
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_ci_run_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_requirements_lock_pins_every_package_with_hashes_and_no_host():
    packages = locked()
    assert len(packages) > 50
    assert all("--hash=sha256:" in rest for _, rest in packages.values())
    text = (ROOT / "requirements.lock").read_text("utf-8")
    requirements = [
        line for line in text.splitlines() if line and not line.startswith((" ", "#"))
    ]
    assert len(requirements) == len(packages)
    assert "://" not in text


def test_requirements_lock_satisfies_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wanted = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["lm"],
        *project["dependency-groups"]["dev"],
    ]
    packages = locked()
    for requirement in map(Requirement, wanted):
        if (name := canonicalize_name(requirement.name)) != "trix-jax":
            version, _ = packages[name]
            assert requirement.specifier.contains(version), (
                f"{requirement}, but requirements.lock has {version}"
            )


def test_configs_parse():
    configs = sorted((ROOT / "configs").glob("*.yaml"))
    assert configs, "configs/ has no YAML files"
    for path in configs:
        assert isinstance(yaml.safe_load(path.read_text("utf-8")), dict), path
