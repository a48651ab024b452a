"""Source code with known licences, for E4: Python packages as their wheels hold them, and
the standard library of the Python that runs this.

    python -m experiments.scale.code_corpus FOLDER             # the packages of code_packages.json
    python -m experiments.scale.code_corpus FOLDER --record NAME...   # chooses them anew

makes `FOLDER/train/PACKAGE/` and `FOLDER/val/PACKAGE/` with the Python files and the
licence files of each, `FOLDER/licences.json`, and `FOLDER/small.txt`, a list of the small
packages of training. A package is on one side as a whole.
Only packages whose licence file has the words of a permissive licence are taken
(`trix_jax.lm.data.code`). pip only downloads; nothing of a package is run. The text stays
its authors': keep the licence files with what you pass on.
"""

import argparse
import hashlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Mapping, Sequence
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from trix_jax.files import read_json, write_json
from trix_jax.lm.data.code import FILE_BYTES, license_of

PACKAGES = Path(__file__).parent / "code_packages.json"
VAL_SHARE = 0.01
SMALL = 3_000_000  # bytes of a package that `small.txt` lists
STDLIB = "python-standard-library"
LICENCE_FILES = ("LICENSE", "LICENCE", "COPYING", "UNLICENSE")
LEFT_OUT = ("site-packages", "__pycache__")


class Package(NamedTuple):
    """A package of the corpus.

    Attributes:
        licence: as its licence file says, an SPDX name; None: not known to be permissive.
        bytes: of its Python files.
        side: "train" or "val".
    """

    name: str
    version: str
    licence: str | None
    bytes: int
    side: str = "train"


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the corpus; returns 0."""
    args = _parsed(argv)
    wheels, unpacked = args.folder / "wheels", args.folder / "unpacked"
    known = [] if args.record else [Package(**one) for one in read_json(PACKAGES)]
    wanted = args.record or [
        f"{one.name}=={one.version}" for one in known if one.name != STDLIB
    ]
    wheels.mkdir(parents=True, exist_ok=True)
    command = [*shlex.split(args.pip), "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(wheels)]
    for name in wanted:
        subprocess.run([*command, name], check=True)
    found = [unpack(wheel, unpacked) for wheel in sorted(wheels.glob("*.whl"))]
    found.append(standard_library(unpacked))
    if args.record:
        packages = divided(found, args.val_share)
        write_json(PACKAGES, [one._asdict() for one in packages])
    else:
        packages = as_recorded(found, known)
    move(packages, unpacked, args.folder)
    write_json(args.folder / "licences.json", [one._asdict() for one in packages])
    print(told(packages, len(found)))
    return 0


def unpack(wheel: Path, folder: Path) -> Package:
    """Writes the Python files of a wheel and the licence files of its metadata to
    `folder/NAME`.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        names.sort(key=lambda name: -name.count("/"))  # of two licences the outer stays
        (about,) = (n for n in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))
        header = HeaderParser().parsestr(archive.read(about).decode("utf-8"))
        name, place = header["Name"].lower(), folder / header["Name"].lower()
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for inner in map(PurePosixPath, names):
            is_about = inner.parts[0].endswith((".dist-info", ".data"))
            if inner.suffix == ".py" and not is_about:
                archive.extract(str(inner), place)
            elif is_about and inner.stem.upper().startswith(LICENCE_FILES):
                (place / inner.name).write_bytes(archive.read(str(inner)))
    return Package(name, header["Version"], license_of(place), size_of(place))


def standard_library(folder: Path) -> Package:
    """Copies the Python files of the standard library to `folder`, its licence too."""
    root, place = Path(sysconfig.get_path("stdlib")), folder / STDLIB
    shutil.rmtree(place, ignore_errors=True)
    for file in sorted(root.rglob("*.py")):
        inner = file.relative_to(root)
        if not set(inner.parts) & set(LEFT_OUT):
            (place / inner).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place / inner)
    shutil.copyfile(root / "LICENSE.txt", place / "LICENSE.txt")
    version = ".".join(map(str, sys.version_info[:3]))
    return Package(STDLIB, version, license_of(place), size_of(place))


def size_of(folder: Path) -> int:
    """Bytes of the Python files that training reads."""
    sizes = (file.stat().st_size for file in folder.rglob("*.py"))
    return sum(size for size in sizes if size <= FILE_BYTES)


def divided(found: Sequence[Package], share: float) -> list[Package]:
    """The packages with a permissive licence, by name. Of those that are validation see
    `chosen`; the standard library is training.

    Raises:
        ValueError: no package fits into validation.
    """
    taken = sorted(one for one in found if one.licence)
    sizes = {one.name: one.bytes for one in taken if one.name != STDLIB}
    least = share * sum(one.bytes for one in taken)
    if not (val := chosen(sizes, least)):
        raise ValueError(
            f"the corpus must have a package of at most {2 * least:,.0f} bytes for "
            f"validation beside others. Got {sizes}."
        )
    return [o._replace(side="val" if o.name in val else "train") for o in taken]


def chosen(sizes: Mapping[str, int], least: float) -> set[str]:
    """Names in the order of their sha256 until they hold `least` bytes, without those
    that would make it more than twice that.
    """
    held, names = 0, set()
    for name in sorted(sizes, key=lambda n: hashlib.sha256(n.encode()).digest()):
        if held < least and held + sizes[name] <= 2 * least:
            held, names = held + sizes[name], names | {name}
    return names


def as_recorded(found: Sequence[Package], known: Sequence[Package]) -> list[Package]:
    """The packages that are recorded, on their sides. The standard library is that of
    the Python at hand.

    Raises:
        ValueError: one is missing, or has another version or licence.
    """
    there = {one.name: one for one in found}
    packages = []
    for one in known:
        own = there.get(one.name)
        alike = own and own.licence == one.licence
        if not own or not alike or (one.name != STDLIB and own.version != one.version):
            raise ValueError(
                f"{one.name} must be version {one.version} under {one.licence}, as "
                f"{PACKAGES.name} has it. Got {own and (own.version, own.licence)}."
            )
        packages.append(own._replace(side=one.side))
    return packages


def move(packages: Sequence[Package], unpacked: Path, folder: Path) -> None:
    """Makes `folder/train`, `folder/val` and `folder/small.txt` anew."""
    for side in ("train", "val"):
        shutil.rmtree(folder / side, ignore_errors=True)
        (folder / side).mkdir()
    for one in packages:
        (unpacked / one.name).rename(folder / one.side / one.name)
    small = [o for o in packages if o.side == "train" and o.bytes <= SMALL]
    lines = [f"{(folder / 'train' / one.name).absolute()}\n" for one in small]
    (folder / "small.txt").write_text("".join(lines), encoding="utf-8")


def told(packages: Sequence[Package], found: int) -> str:
    """What the corpus holds, in a line."""
    sizes = {
        side: sum(one.bytes for one in packages if one.side == side)
        for side in ("train", "val")
    }
    return (
        f"{len(packages)} packages with a permissive licence of {found}: "
        f"{sizes['train'] / 1e6:.0f} MB of training, {sizes['val'] / 1e6:.0f} MB of validation"
    )


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--record", nargs="+", metavar="NAME", default=[])
    parser.add_argument("--val-share", type=float, default=VAL_SHARE, help="recorded")
    parser.add_argument("--pip", default=own_pip(), help="the command")
    return parser.parse_args(argv)


def own_pip() -> str:
    """The command for this Python's pip; an environment of uv has none, so uv runs one."""
    if importlib.util.find_spec("pip"):
        return shlex.join([sys.executable, "-m", "pip"])
    return shlex.join(["uvx", "--python", sys.executable, "pip"])


if __name__ == "__main__":
    sys.exit(main())
