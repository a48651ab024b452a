"""Files of a folder: links, suffixes in any case, archives, arrays, and what is left."""

import gzip
import json

import pyarrow as pa
import pytest

from trix_jax.lm.data import infer_source, iter_documents

BOM = b"\xef\xbb\xbf"  # of UTF-8

pytestmark = pytest.mark.usefixtures("no_type_hook")


def documents(path, source=None):
    lines = []
    source = source or infer_source(path)
    return list(iter_documents(source, path, report=lines.append)), lines


def packed(data):
    """Without the time, which would give both workers of the tests other names."""
    return gzip.compress(data, mtime=0)


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


def jsonl(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_folders_and_files_that_are_links_are_read_and_a_cycle_ends(tmp_path):
    corpus, outside = tmp_path / "corpus", tmp_path / "outside"
    (corpus / "a").mkdir(parents=True)
    (outside / "deep").mkdir(parents=True)
    (corpus / "a" / "one.txt").write_text("one")
    (outside / "deep" / "two.txt").write_text("two")
    (outside / "three.txt").write_text("three")
    (corpus / "link").symlink_to(outside, target_is_directory=True)
    (corpus / "four.txt").symlink_to(outside / "three.txt")
    (corpus / "a" / "up").symlink_to(corpus, target_is_directory=True)
    (outside / "deep" / "again").symlink_to(outside, target_is_directory=True)
    (corpus / "broken.txt").symlink_to(tmp_path / "nothing")
    found, lines = documents(corpus)
    assert found == ["one", "three", "two", "three"]  # by path: a, four, link
    assert lines == [
        "skipped 1 file(s) that source=text does not read (1 .txt), the first broken.txt"
    ]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.TXT", b"upper", ["upper"]),
        ("a.txt.gz", packed(b"packed"), ["packed"]),
        ("a.txt.zst", zstd(b"packed too"), ["packed too"]),
        ("a.JSONL", jsonl("x", "y"), ["x", "y"]),
        ("a.ndjson", jsonl("x", "y"), ["x", "y"]),
        ("a.jsonl", jsonl("x", None, "y"), ["x", "y"]),  # as in a table
        ("a.jsonl.gz", packed(jsonl("x", "y")), ["x", "y"]),
        ("a.jsonl.GZ", packed(jsonl("x")) + packed(jsonl("y")), "xy"),
        ("a.jsonl.zst", zstd(jsonl("x", "y")), ["x", "y"]),
        ("a.jsonl.zst", zstd(jsonl("x")) + zstd(jsonl("y")), ["x", "y"]),
        ("a.json", b'\n [{"text": "x"},\n {"text": "y", "z": 1}]', ["x", "y"]),
        ("a.json", b'["x", "y"]', ["x", "y"]),
        ("a.json", b"\n" + jsonl("x", "y"), ["x", "y"]),
        ("a.json.gz", packed(b'["x"]'), ["x"]),
        ("a.txt", BOM + b"mark", ["mark"]),
        ("a.txt", BOM + BOM + b"two", ["\ufefftwo"]),
        ("a.txt", b"in" + BOM + b"side", ["in\ufeffside"]),
        ("a.txt.gz", packed(BOM + b"mark"), ["mark"]),
        ("a.json", BOM + b'["x", "y"]', ["x", "y"]),
        ("a.json", BOM + b'\n["x"]', ["x"]),
        ("a.json", BOM + jsonl("x", "y"), ["x", "y"]),
        ("a.jsonl", BOM + jsonl("x", "y"), ["x", "y"]),
        ("a.jsonl", BOM + b"\r\n" + jsonl("x"), ["x"]),
    ],
)
def test_file_and_folder_of_it_are_read_as_what_they_hold(
    name, content, texts, tmp_path
):
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name) == (list(texts), [])
    assert documents(tmp_path) == (list(texts), [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"}, {"txt": 1}]', r'entry 2: must be .* "text"'),
        ("a.json", b'[{"text": "x"}, 3]', r"entry 2: must be"),
        ("a.json", b'[{"text": "x"', "is not a JSON array"),
        ("a.jsonl", b'["x", "y"]', "line 1: must be"),
        ("a.jsonl", b'"x"\n', "line 1: must be"),
        ("a.json", b'\n{"text": "x"}\n{', "line 3: must be"),
        ("a.jsonl", BOM + b'\n{"text": "x"}\n{', "line 3: must be"),
        ("a.txt", BOM + b"ab\xff", "not UTF-8 text: invalid start byte at offset 5"),
        ("a.txt", BOM, "is empty"),
        ("a.txt.gz", packed(b"packed" * 99)[:-9], "cannot be unpacked"),
        ("a.txt.gz", b"no archive", "cannot be unpacked"),
        ("a.jsonl.zst", zstd(jsonl("x" * 999))[:-9], "cannot be unpacked"),
        ("a.jsonl.zst", b"no archive", "cannot be unpacked"),
    ],
)
def test_file_that_is_not_what_it_says_is_an_error_with_the_place(
    name, content, message, tmp_path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        documents(tmp_path / name)


def test_mixed_folder_reads_one_kind_and_names_the_rest_in_one_line(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(jsonl("x"))
    for name in ("a.txt", "c.txt.gz", "d.json", "README"):
        (tmp_path / name).write_text("not this")
    assert documents(tmp_path) == (
        ["x"],
        [
            "skipped 4 file(s) that source=jsonl does not read "
            "(2 .txt, 1 without a suffix, 1 .json), the first README"
        ],
    )
    found, lines = documents(tmp_path, "text")
    assert found == ["not this"]  # c.txt.gz is no archive
    assert len(lines) == 2
