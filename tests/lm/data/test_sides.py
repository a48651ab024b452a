"""Validation of one's own beside training: no text is on both sides."""

import dataclasses
import gzip
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
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


SPLIT = {"train": "aaa", "validation": "bbb", "test": "ccc"}
LAYOUTS = [
    "{}-00000-of-00001.parquet",
    "{}.jsonl",
    "wiki.{}.txt",
    "{}/0000.parquet",
    "data/{}/part-0.txt",
    "books-{}.json",
    "{}.txt.gz",
]


def write_any(path, own):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [own]}), path)
    elif path.suffix in (".jsonl", ".json"):
        path.write_text(json.dumps({"text": own}))
    else:
        packed = path.suffix == ".gz"
        path.write_bytes(gzip.compress(own.encode()) if packed else own.encode())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_is_the_files_that_say_so_and_test_is_passed_over(layout, tmp_path):
    path = tmp_path / "in"
    for side, own in SPLIT.items():
        write_any(path / layout.format(side), own)
    config, lines = DataConfig(path=path), []
    store = prepare(config, tmp_path / "store", lines.append)
    assert (text(store.train), text(store.val)) == ("aaa", "bbb")
    assert [line for line in lines if "file(s) are" in line] == [
        f"1 file(s) are validation by their names, the first {layout.format('validation')}",
        "1 file(s) are passed over, test or validation by their names, the first "
        + layout.format("test"),
    ]
    assert store.manifest["source"].endswith("; validation from 1 file(s) of it")
    again = prepare(config, tmp_path / "store", quiet)
    assert again.fingerprint == store.fingerprint
    write_any(path / layout.format("validation"), "bb!")
    with pytest.raises(ValueError, match=r"now: .*validation.* changed"):
        prepare(config, tmp_path / "store", quiet)
    (path / layout.format("validation")).unlink()
    with pytest.raises(ValueError, match=r"now: .*validation.* is gone"):
        prepare(config, tmp_path / "store", quiet)
    shutil.rmtree(path)
    assert prepare(config, tmp_path / "store", lines.append).train is not None
    assert [line for line in lines if "not there any more" in line] == lines[-1:]


@pytest.mark.parametrize("layout", ["{}.jsonl", "{}/0000.txt", "wiki-{}.txt"])
@pytest.mark.parametrize("test", ["testing", "eval", "evaluation"])
def test_the_words_are_those_of_hugging_face(layout, test, tmp_path):
    for side, own in {"train": "aaa", "dev": "bbb", test: "ccc"}.items():
        write_any(tmp_path / "in" / layout.format(side), own)
    store = prepare(DataConfig(path=tmp_path / "in"), tmp_path / "store", quiet)
    assert (text(store.train), text(store.val)) == ("aaa", "bbb")


@pytest.mark.parametrize("how", ["by name", "val_path", "near_duplicates"])
def test_training_documents_that_are_in_validation_too_are_counted(how, tmp_path):
    copy = "one two three four five six"
    own = {"train-0": copy, "train-1": "only here, once", "train-2": copy}
    path = write(tmp_path / "in", **own)
    val = write(path if how == "by name" else tmp_path / "out", **{"val-0": copy})
    config = DataConfig(path=path, val_path=None if how == "by name" else val)
    if how == "near_duplicates":
        config = dataclasses.replace(config, near_duplicates=0.8)
    lines = []
    store = prepare(config, tmp_path / "store", lines.append)
    said = "2 training document(s) are in validation too"
    assert (said in lines) == (how != "near_duplicates")
    assert text(store.train).count(copy) == (0 if how == "near_duplicates" else 2)


SHARD = "-00000-of-00001"
HASHES = ["1359597a978bc4fa", "c0de2bad4face098", "0123456789abcdef"]
SHARDS = [
    [f"data/{{}}{SHARD}-{own}.parquet" for own in HASHES],
    ["{}.parquet", f"{{}}{SHARD}.parquet", f"{{}}{SHARD}.parquet"],
]


@pytest.mark.parametrize("layouts", SHARDS, ids=["hashes", "one is whole"])
def test_the_number_and_the_hash_of_a_shard_are_no_words(layouts, tmp_path):
    for layout, (side, own) in zip(layouts, SPLIT.items(), strict=True):
        write_any(tmp_path / "in" / layout.format(side), own)
    store = prepare(DataConfig(path=tmp_path / "in"), tmp_path / "store", quiet)
    assert (text(store.train), text(store.val)) == ("aaa", "bbb")


@pytest.mark.parametrize(("val", "sides"), [("test", "aaa ccc"), ("out", "aaa eee")])
def test_val_path_decides_and_other_names_are_passed_over(val, sides, tmp_path):
    path, lines = tmp_path / "in", []
    for side, own in SPLIT.items():
        write_any(path / f"{side}-0.txt", own)
    write(tmp_path, out="eee")
    val_path = {"test": path / "test-0.txt", "out": tmp_path / "out.txt"}[val]
    config = DataConfig(path=path, val_path=val_path)
    store = prepare(config, tmp_path / "store", lines.append)
    assert f"{text(store.train)} {text(store.val)}" == sides
    assert any(
        "passed over" in line and "validation-0.txt" in line for line in lines
    ) == (val == "test")


BOOKS = {
    "the_test_of_time.txt": "aaa",
    "contest.txt": "bbb",
    "train_to_nowhere.txt": "ccc",
    "a valid point/one.txt": "ddd",
    "train/test_of_faith.txt": "eee",
}


def test_a_book_whose_title_has_a_word_is_training(tmp_path):
    for name, own in BOOKS.items():
        write_any(tmp_path / "in" / name, own * 9)
    lines = []
    store = prepare(DataConfig(path=tmp_path / "in"), tmp_path / "store", lines.append)
    assert {*text(store.train), *text(store.val)} == {*"abcde"}
    assert [line for line in lines if "say test or validation" in line] == [
        "3 file(s) are training although their names say test or validation, because "
        "none beside them of such a name says train, the first a valid point/one.txt"
    ]


def test_a_store_that_was_trained_on_validation_says_so(tmp_path):
    path = tmp_path / "in"
    for side in ("test", "validation"):
        write_any(path / f"{side}.txt", f"{side} words " * 9)
    config = DataConfig(path=path)
    prepare(config, tmp_path / "store", quiet)  # as before the rule, or without train
    write_any(path / "train.txt", "train words " * 9)
    with pytest.raises(ValueError, match=r"test\.txt is not taken any more, train"):
        prepare(config, tmp_path / "store", quiet)
