"""Source code by language and licence, The Stack's contents, near-duplicates, and the
number of tokens.
"""

import gzip
import hashlib
import importlib
import json
import queue
import random
import sysconfig
import threading
import tracemalloc
from pathlib import Path

import pytest

from trix_jax.lm.data import DataConfig, code, iter_documents, prepare
from trix_jax.lm.data.code import license_of, stack_documents
from trix_jax.lm.data.datasets import Dataset
from trix_jax.lm.data.download import fetch
from trix_jax.lm.data.near_duplicates import NearDuplicates

MIT = "MIT License\n\nPermission is hereby granted, free of charge, to any person\nobtaining a copy of this software ..."
GPL = "GNU General Public License version 3 ..."


def quiet(line):
    pass


@pytest.fixture
def repositories(tmp_path):
    for name, license_text in (("a", MIT), ("b", GPL), ("c", None)):
        folder = tmp_path / "repos" / name
        folder.mkdir(parents=True)
        (folder / "x.py").write_text(f"name = {name!r}\n")
        (folder / "x.rs").write_text(f"// {name}\n")
        if license_text:
            (folder / "LICENSE").write_text(license_text)
    return tmp_path / "repos"


def test_code_takes_permissive_repositories_and_one_language(repositories):
    lines = []
    read = iter_documents(
        "code",
        repositories,
        report=lines.append,
        languages="python",
        licenses="permissive",
    )
    assert list(read) == ["name = 'a'\n"]
    assert "MIT 1, no permissive licence file 2" in lines[0]


def test_validation_folder_beside_code_is_code_of_the_same_kind(repositories, tmp_path):
    (repositories / "b").rename(tmp_path / "b")  # GPL: neither side takes it
    (tmp_path / "val").mkdir()
    (repositories / "c").rename(tmp_path / "val" / "c")
    (tmp_path / "b").rename(tmp_path / "val" / "b")
    (tmp_path / "val" / "c" / "LICENSE.txt").write_text(MIT)
    paths = {"path": str(repositories), "val_path": str(tmp_path / "val")}
    kind = {"source": "code", "languages": "python", "licenses": "permissive"}
    config = DataConfig(**paths, **kind)
    store = prepare(config, tmp_path / "store", quiet)
    sides = store.train, store.val
    texts = [bytes(side.window(0, len(side)).tolist()) for side in sides]
    assert texts == [b"name = 'a'\n", b"name = 'c'\n"]
    assert prepare(config, tmp_path / "store", quiet).fingerprint == store.fingerprint
    (tmp_path / "val" / "c" / "x.py").write_text("name = 'd'\n")
    with pytest.raises(ValueError, match=r"c/x\.py changed"):
        prepare(config, tmp_path / "store", quiet)


def read_code(path, **flags):
    lines = []
    return list(iter_documents("code", path, report=lines.append, **flags)), lines


def test_a_vendored_licence_does_not_make_repositories_of_one(tmp_path):
    (tmp_path / "src").mkdir()
    for name in ("third_party", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "LICENSE").write_text(MIT)
        (tmp_path / name / "x.py").write_text("third = 1\n")
    (tmp_path / "main.py").write_text("main = 1\n")
    (tmp_path / "src" / "app.py").write_text("app = 1\n")
    assert read_code(tmp_path) == (["main = 1\n", "app = 1\n"], [])


def test_source_beside_repositories_is_read_or_told(repositories):
    (repositories / "all.py").write_text("all = 1\n")
    for name in (".git", "build"):  # no repositories, whatever they hold
        (repositories / name).mkdir()
        (repositories / name / "LICENSE").write_text(MIT)
        (repositories / name / "x.py").write_text("left = 1\n")
    texts, lines = read_code(repositories, languages="python")
    assert texts == ["all = 1\n", *(f"name = {name!r}\n" for name in "abc")]
    assert lines == ["left out 2 folder(s) by their names, the first .git"]
    kind = {"languages": "python", "licenses": "permissive"}
    texts, lines = read_code(repositories, **kind)
    assert texts == ["name = 'a'\n"]
    assert lines[1:] == [
        "repositories by licence: MIT 1, no permissive licence file 2; those without are "
        "left out",
        "left out 1 source file(s) beside the repositories, under no permissive licence "
        "file, the first all.py",
    ]


def test_code_takes_a_list_of_repositories(repositories, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text(f"{repositories / 'c'}\n{repositories / 'a'}\n")
    found = list(iter_documents("code", listed, languages="rust", report=quiet))
    assert found == ["// c\n", "// a\n"]
    listed.write_bytes(b"\xef\xbb\xbf" + listed.read_bytes())  # a byte order mark
    assert list(iter_documents("code", listed, languages="rust", report=quiet)) == found


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"languages": "cobol"}, "languages must be of python"),
        ({"licenses": "permissive"}, "must hold a repository with a permissive"),
    ],
)
def test_code_says_what_it_cannot_take(tmp_path, flags, match):
    (tmp_path / "x.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=match):
        list(iter_documents("code", tmp_path, report=quiet, **flags))


def test_license_of_a_mixed_file_is_not_permissive(tmp_path):
    (tmp_path / "LICENSE").write_text(f"{MIT}\nor\n{GPL}")
    assert license_of(tmp_path) is None


@pytest.mark.parametrize("name", ["COPYING", "LICENSE", "LICENSE.z", "LICENSES.txt"])
def test_license_of_a_repository_with_copyleft_in_any_file_is_none(tmp_path, name):
    (tmp_path / "LICENSE.third-party").write_text(MIT)
    assert license_of(tmp_path) == "MIT"
    (tmp_path / name).write_text(GPL)
    assert license_of(tmp_path) is None


def test_license_of_several_files_is_the_first_that_is_known(tmp_path):
    (tmp_path / "COPYING").write_text("Ask us.")
    (tmp_path / "LICENSE").write_text(MIT)
    (tmp_path / "LICENSE.apache").write_text("Apache License\nVersion 2.0")
    assert license_of(tmp_path) == "MIT"


def test_license_of_python_is_its_own():
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "LICENSE.txt").is_file():
        pytest.skip("this Python came without its licence")
    assert license_of(root) == "PSF-2.0"


@pytest.fixture
def stack(data_hub, table_bytes):
    sources = [f"print({i})\n" for i in range(9)]
    ids = [hashlib.sha1(s.encode()).hexdigest() for s in sources]
    rows = {
        "blob_id": ids,
        "src_encoding": ["UTF-8"] * 9,
        "license_type": ["permissive"] * 8 + ["no_license"],
        "is_vendor": [False] * 7 + [True, False],
        "is_generated": [False] * 9,
        "length_bytes": [9] * 9,
    }
    data_hub.files["data/Python/train-0.parquet"] = table_bytes(rows)
    data_hub.contents = {
        name: gzip.compress(source.encode())
        for name, source in zip(ids, sources, strict=True)
    }
    del data_hub.contents[ids[3]]
    kept = [s for i, s in enumerate(sources) if i not in (3, 7, 8)]
    return (
        Dataset(
            "x/stack", "0" * 40, ("data/Python/",), 10, 300, 0.1, most=1, is_code=True
        ),
        ids,
        kept,
    )


def test_stack_documents_are_permissive_own_and_fetched_once(data_hub, stack):
    dataset, _, kept = stack
    shards = fetch(dataset, quiet)
    lines = []
    texts = [t for t in stack_documents(dataset, shards, lines.append) if t]
    assert texts == kept
    assert "left out 1 file(s)" in lines[0]
    data_hub.contents.clear()
    again = [t for t in stack_documents(dataset, shards, quiet) if t]
    assert again == kept


def test_stack_documents_may_be_dropped_in_one_of_their_threads(
    data_hub, stack, monkeypatch
):
    """The garbage collector runs in whichever thread allocates."""
    dataset, ids, kept = stack
    has_first, closed = threading.Event(), queue.Queue()
    content = code._content

    def close(row, folder):
        text = content(row, folder)
        if row["blob_id"] == ids[2]:
            has_first.wait()
            closed.put(documents.close())
        return text

    monkeypatch.setattr(code, "_content", close)
    documents = stack_documents(dataset, fetch(dataset, quiet), quiet)
    assert next(documents) == kept[0]
    has_first.set()
    assert closed.get(timeout=30) is None
    assert list(documents) == []


def test_stack_content_that_is_another_is_refused(data_hub, stack):
    dataset, ids, _ = stack
    data_hub.contents[ids[0]] = gzip.compress(b"something else")
    with pytest.raises(RuntimeError, match="must have that sha1"):
        list(stack_documents(dataset, fetch(dataset, quiet), quiet))


def words(seed, count=200):
    draw = random.Random(seed)
    return [f"w{draw.randrange(5000)}" for _ in range(count)]


def test_near_duplicates_finds_an_edited_copy_and_nothing_else():
    kept = [words(i) for i in range(50)]
    index = NearDuplicates([" ".join(w) for w in kept], 0.8)
    edited = [*kept[7][:100], "changed", *kept[7][101:]]
    assert index.holds(" ".join(edited))
    assert index.holds("\n".join(kept[7]).upper())
    assert not any(index.holds(" ".join(words(i))) for i in range(50, 150))
    half = kept[7][:100] + words(999)[:100]
    assert not index.holds(" ".join(half))
    assert not index.holds("too short")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def test_prepare_leaves_near_duplicates_of_validation_out_of_training(tmp_path):
    texts = [" ".join(words(i)) for i in range(60)]
    edited = [text.replace(text.split()[100], "changed", 1) for text in texts]
    path = write(tmp_path / "a.jsonl", texts + edited)
    lines = []
    plain = prepare(DataConfig("jsonl", path), tmp_path / "plain", quiet)
    config = DataConfig("jsonl", path, near_duplicates=0.8)
    store = prepare(config, tmp_path / "store", lines.append)
    removed = store.manifest["near_duplicates_removed"]
    # A pair that the split tears apart loses its training half.
    val = set(_documents(plain, plain.val))
    pairs = zip(texts, edited, strict=True)
    assert removed == sum((a in val) != (b in val) for a, b in pairs) > 0
    assert len(_documents(store, store.train)) == 120 - len(val) - removed
    assert any(f"{removed} near-duplicate(s)" in line for line in lines)
    assert len(store.val) == len(plain.val)


def _documents(store, split):
    text = store.tokenizer.decode(split.window(0, len(split)))
    return text.split("<|endoftext|>")[:-1]


def test_prepare_stops_at_max_tokens(tmp_path):
    path = write(tmp_path / "a.jsonl", [" ".join(words(i)) for i in range(60)])
    config = DataConfig("jsonl", path, max_tokens=5000)
    store = prepare(config, tmp_path / "store", quiet)
    assert len(store.train) == store.manifest["splits"]["train"]["tokens"] == 5000


def test_prepare_says_when_the_source_is_too_short(tmp_path):
    path = write(tmp_path / "a.jsonl", ["some text", "more text", "the last"])
    lines = []
    config = DataConfig("jsonl", path, max_tokens=10**6)
    prepare(config, tmp_path / "store", lines.append)
    assert "ended before max_tokens=1,000,000" in lines[-1]


@pytest.mark.slow
def test_prepare_holds_no_more_of_a_corpus_four_times_as_large(tmp_path, monkeypatch):
    # Both corpora are several batches; the name `prepare` in the package is the function.
    module = importlib.import_module("trix_jax.lm.data.prepare")
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 50_000)
    peaks = []
    for copies in (200, 800):
        texts = (" ".join(words(i)) for i in range(copies))
        path = write(tmp_path / f"{copies}.jsonl", texts)
        config = DataConfig(
            "jsonl", path, val_fraction=20 / copies, near_duplicates=0.8
        )
        tracemalloc.start()
        prepare(config, tmp_path / f"store-{copies}", quiet)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]
