"""Validation of one's own beside training: no text is on both sides."""

import shutil

import pytest

from trix_jax.lm.data import DataConfig, prepare

pytestmark = pytest.mark.usefixtures("no_type_hook")


def quiet(line):
    pass


def text(split):
    return bytes(b for b in split.window(0, len(split)).tolist() if b < 256).decode()


def write(folder, **texts):
    for name, own in texts.items():
        path = folder / name.replace("__", "/")
        path = path.with_name(f"{path.name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(own)
    return folder


@pytest.mark.parametrize("val", ["b.txt", "held", "more"])
def test_validation_inside_of_the_path_is_no_training(val, tmp_path):
    path = write(tmp_path / "in", a="aaa", b="bbb", held__c="ccc", held__d="ddd")
    write(tmp_path / "out", e="eee")
    (path / "more").symlink_to(tmp_path / "out")
    sides = {"b.txt": "bbb", "held": "cccddd", "more": "eee"}
    config, lines = DataConfig(path=path, val_path=path / val), []
    store = prepare(config, tmp_path / "store", lines.append)
    assert text(store.val) == sides[val]
    rest = [t for t in ("aaa", "bbb", "ccc", "ddd", "eee") if t not in sides[val]]
    assert text(store.train) == "".join(rest)
    count = len(sides[val]) // 3
    assert f"{count} file(s) of path are those of val_path: no training" in lines
    again = prepare(config, tmp_path / "store", quiet)
    assert again.fingerprint == store.fingerprint
    shutil.rmtree(path)
    assert prepare(config, tmp_path / "store", quiet).fingerprint == store.fingerprint


@pytest.mark.parametrize(
    ("path", "val"),
    [("c/a.txt", "c"), ("c", "c"), ("c/a.txt", "c/a.txt"), ("c", "."), ("t", "c")],
)
def test_training_text_inside_of_validation_is_refused(path, val, tmp_path):
    write(tmp_path / "c", a="aaa", b="bbb")
    write(tmp_path / "t", e="eee")
    (tmp_path / "t" / "more").symlink_to(tmp_path / "c")
    config = DataConfig(path=tmp_path / path, val_path=tmp_path / val)
    with pytest.raises(ValueError, match=r"val_path=.* must hold other files .*a\.txt"):
        prepare(config, tmp_path / "store", quiet)


def test_code_inside_of_code_is_no_training(tmp_path):
    for name in "abc":
        (tmp_path / "repos" / name).mkdir(parents=True)
        (tmp_path / "repos" / name / "x.py").write_text(f"{name * 3}\n")
    path = tmp_path / "repos"
    config = DataConfig(source="code", path=path, val_path=path / "b")
    store = prepare(config, tmp_path / "store", quiet)
    assert text(store.train) == "aaa\nccc\n"
    assert text(store.val) == "bbb\n"
