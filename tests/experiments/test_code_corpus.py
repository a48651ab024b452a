"""The corpus of E4: wheels to source, sides, and the record."""

import json
import sys
import zipfile

import pytest

from experiments.scale import code_corpus
from trix_jax.files import read_json

MIT = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of "
    "this software"
)


def wheel(folder, name, files, licence=MIT):
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        about = f"{name}-1.0.dist-info"
        archive.writestr(f"{about}/METADATA", f"Name: {name}\nVersion: 1.0\n\nText")
        archive.writestr(f"{about}/licenses/sub/LICENSE", "inner")
        archive.writestr(f"{about}/licenses/LICENSE", licence)
    return path


def test_wheel_is_unpacked_to_its_source_and_its_licence(tmp_path):
    files = {
        "duck/a.py": "x = 1\n",
        "duck/b.so": "no",
        "duck/vendor.dist-info/METADATA": "",
    }
    one = code_corpus.unpack(wheel(tmp_path, "duck", files), tmp_path / "u")
    assert one == ("duck", "1.0", "MIT", 6, "train")
    held = sorted(
        str(p.relative_to(tmp_path / "u")) for p in (tmp_path / "u").rglob("*.*")
    )
    assert held == ["duck/duck/a.py"]
    assert (tmp_path / "u/duck/LICENSE").read_text() == MIT


def test_packages_are_on_one_side_by_their_names_and_only_permissive_ones():
    # By sha256 the order is d, c, b, a.
    sizes = {"a": 10, "b": 20, "c": 100, "d": 5}
    assert code_corpus.chosen(sizes, 12) == {"d", "a"}  # c and b would be too much
    found = [code_corpus.Package(n, "1", "MIT", size) for n, size in sizes.items()]
    found.append(code_corpus.Package("gpl", "1", None, 50))
    found.append(code_corpus.Package(code_corpus.STDLIB, "3", "PSF-2.0", 65))
    sides = {one.name: one.side for one in code_corpus.divided(found, 0.06)}
    val = {name for name, side in sides.items() if side == "val"}
    assert (val, "gpl" in sides) == ({"d", "a"}, False)
    with pytest.raises(ValueError, match="must have a package of at most"):
        code_corpus.divided(found, 0.001)


def test_corpus_is_made_and_made_again_as_it_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(code_corpus, "PACKAGES", tmp_path / "packages.json")
    shelf, lib = tmp_path / "c" / "wheels", tmp_path / "lib"
    shelf.mkdir(parents=True)
    lib.mkdir()
    (lib / "LICENSE.txt").write_text("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2")
    (lib / "os.py").write_text("pass\n")
    monkeypatch.setattr(code_corpus.sysconfig, "get_path", lambda _: str(lib))
    for name in ("a", "d"):
        wheel(shelf, name, {f"{name}.py": "1\n"})
    wheel(shelf, "gpl", {"gpl.py": "1\n"}, licence="GNU General Public License")
    argv = [str(tmp_path / "c"), "--pip", "true"]
    assert (
        code_corpus.main([*argv, "--val-share", "0.2", "--record", "a", "d", "gpl"])
        == 0
    )
    first = json.loads((tmp_path / "packages.json").read_text())
    assert {o["name"]: o["side"] for o in first} == {
        "a": "train",
        "d": "val",
        code_corpus.STDLIB: "train",
    }
    assert (tmp_path / "c/val/d/d.py").is_file()
    assert not (tmp_path / "c/train/gpl").exists()
    assert (tmp_path / "c/small.txt").read_text().count("\n") == 2
    assert code_corpus.main(argv) == 0
    assert read_json(tmp_path / "c/licences.json") == first
    (shelf / "a-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ValueError, match=r"a must be version 1\.0 under MIT"):
        code_corpus.main(argv)


def test_committed_packages_have_a_permissive_licence_and_a_side():
    packages = read_json(code_corpus.PACKAGES)
    names = [one["name"] for one in packages]
    assert len(set(names)) == len(names) > 40
    assert all(one["licence"] for one in packages)
    sizes = {
        side: sum(o["bytes"] for o in packages if o["side"] == side)
        for side in ("train", "val")
    }
    # More than 50 million tokens, were every token as long as seven bytes.
    assert sizes["train"] > 5 * 50e6
    assert 0.01 <= sizes["val"] / sizes["train"] <= 0.03


def test_pip_is_that_of_this_python_and_uvs_where_it_has_none(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert code_corpus.own_pip().endswith(" -m pip")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert code_corpus.own_pip() == f"uvx --python {sys.executable} pip"
