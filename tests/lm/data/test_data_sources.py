"""Sources: what they yield, in what order, and what they say about bad input."""

import json
import urllib.error
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trix_jax.lm.data import infer_source, iter_documents


def read(source, path=None, max_bytes=None, report=lambda line: None):
    return list(iter_documents(source, path, max_bytes, report))


def write_parquet(path, texts):
    """Writes rows with the ten columns of a FineWeb-Edu sample-10BT shard."""
    n = len(texts)
    strings = {
        name: [f"{name}{i}" for i in range(n)]
        for name in ("id", "dump", "url", "file_path")
    }
    columns = {"text": pa.array(texts, pa.string()), **strings, "language": ["en"] * n}
    columns |= {
        "language_score": [0.9] * n,
        "token_count": list(range(n)),
        "score": [3.1] * n,
    }
    pq.write_table(pa.table(columns | {"int_score": [3] * n}), path, row_group_size=2)


def test_stdlib_is_deterministic_python_of_documented_size():
    documents = read("stdlib")
    assert documents == read("stdlib")
    assert 1.3e6 < sum(len(text.encode()) for text in documents) < 1.7e6
    assert len(documents) > 50
    assert sum("def " in text for text in documents) > len(documents) / 2


def test_stdlib_with_a_path_raises(tmp_path):
    with pytest.raises(ValueError, match="takes no path"):
        read("stdlib", tmp_path)


def test_text_folder_reads_sorted_whole_and_counts_unreadable(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two\r\nlines\n")
    (tmp_path / "a.txt").write_text("one é", encoding="utf-8")
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "other.md").write_text("not taken")
    lines = []
    assert read("text", tmp_path, report=lines.append) == [
        "one é",
        "two\r\nlines\n",
        "three",
    ]
    lines = [line for line in lines if "cannot be read" in line]
    assert len(lines) == 1
    assert "skipped 2 file(s)" in lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a\0b", "NUL byte at offset 1"),
        (b"ab\xff", "not UTF-8 text.*offset 2"),
    ],
)
def test_text_named_bad_file_raises(content, message, tmp_path):
    path = tmp_path / "named.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"named\.txt.*{message}"):
        read("text", path)


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "code"])
def test_local_source_missing_path_raises(source, tmp_path):
    with pytest.raises(ValueError, match=r"absent.*does not exist"):
        read(source, tmp_path / "absent")
    with pytest.raises(ValueError, match="needs a path"):
        read(source, None)


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet"])
def test_local_source_folder_without_its_files_raises(source, tmp_path):
    with pytest.raises(ValueError, match="folder without any"):
        read(source, tmp_path)


def test_max_bytes_cuts_last_document_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "b.txt").write_text("éé", encoding="utf-8")
    (tmp_path / "c.txt").write_text("never")
    assert read("text", tmp_path, max_bytes=6) == ["abc", "é"]
    assert read("text", tmp_path, max_bytes=7) == ["abc", "éé"]
    assert read("text", tmp_path, max_bytes=3) == ["abc"]


def test_jsonl_reads_text_and_passes_blank_lines(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text(
        '{"text": "one", "id": 1}\n\n{"text": ""}\n{"text": "two\\nlines"}',
        encoding="utf-8",
    )
    assert read("jsonl", path) == ["one", "two\nlines"]


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "cut',
        b'{"body": "x"}',
        b'{"text": 3}',
        b'["text"]',
        b'{"text": "\\ud800"}',
        b"\xff",
    ],
)
def test_jsonl_bad_line_names_file_and_line(line, tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"docs\.jsonl, line 3: must be a JSON object"):
        read("jsonl", path)


def test_parquet_fineweb_schema_streams_texts_in_order(tmp_path):
    write_parquet(tmp_path / "001.parquet", ["c", "d"])
    write_parquet(tmp_path / "000.parquet", ["a", None, "", "b"])
    assert read("parquet", tmp_path) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)
def test_parquet_any_column_of_strings_gives_texts(kind, tmp_path):
    texts = pa.array(["a", None, "b", "", "a"]).cast(kind)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found = read("parquet", tmp_path)
    assert found == ["a", "b", "a"]
    assert {type(text) for text in found} == {str}


def test_parquet_without_text_column_names_file_and_columns(tmp_path):
    path = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"body": ["x"], "text": [1]}), path)
    with pytest.raises(
        ValueError, match=r"odd\.parquet.*columns body: string, text: int64"
    ):
        read("parquet", path)


def test_parquet_garbage_names_file(tmp_path):
    path = tmp_path / "odd.parquet"
    path.write_bytes(b"this is not parquet")
    with pytest.raises(ValueError, match=r"odd\.parquet is not a readable parquet"):
        read("parquet", path)


def test_code_takes_sources_and_leaves_hidden_vendored_and_binary(tmp_path):
    kept = {"a.py": "x = 1\n", "src/b.rs": "fn main() {}\n"}
    left = {
        ".hidden.py": "h",
        ".git/c.py": "g",
        "node_modules/d.js": "n",
        "notes.txt": "t",
    }
    for name, text in (kept | left).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.py").write_bytes(b"\0\1")
    lines = []
    assert read("code", tmp_path, report=lines.append) == list(kept.values())
    assert "skipped 1 file(s)" in lines[0]
    with pytest.raises(ValueError, match="needs a folder"):
        read("code", tmp_path / "a.py")


def test_shakespeare_wrong_local_file_names_both_hashes(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("To be")
    with pytest.raises(
        ValueError,
        match=r"input\.txt is not TinyShakespeare: sha256 must be 86c4.*Got ",
    ):
        read("shakespeare", path)


def test_shakespeare_offline_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(
        ConnectionError,
        match=r"could not be downloaded from https://.*no network.*local copy",
    ):
        read("shakespeare")


def test_shakespeare_altered_download_is_refused_and_not_cached(tmp_path, monkeypatch):
    (tmp_path / "served").write_text("something else")
    served = (tmp_path / "served").as_uri()
    real = urllib.request.urlopen
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: real(served))
    with pytest.raises(ValueError, match="is not TinyShakespeare"):
        read("shakespeare")
    assert not (tmp_path / "cache").exists()


def test_shakespeare_download_is_cached_and_read_offline(tmp_path, monkeypatch):
    text, calls = "a stand-in with its own hash", []
    (tmp_path / "served").write_text(text)
    served, real = (tmp_path / "served").as_uri(), urllib.request.urlopen

    def download(url, timeout):
        calls.append(url)
        return real(served)

    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(urllib.request, "urlopen", download)
    monkeypatch.setattr(
        "trix_jax.lm.data.sources.SHAKESPEARE_SHA256",
        hashlib.sha256(text.encode()).hexdigest(),
    )
    assert read("shakespeare") == read("shakespeare") == [text]
    assert len(calls) == 1


def test_infer_source_goes_by_suffix_and_first_kind_held(tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.txt").write_text("a")
    assert infer_source("x.jsonl") == infer_source("x.ndjson.gz") == "jsonl"
    assert infer_source("x.parquet") == "parquet"
    assert infer_source("x") == "text"
    assert infer_source(tmp_path / "t") == "text"
    (tmp_path / "t" / "a.jsonl").write_text(json.dumps({"text": "a"}))
    assert infer_source(tmp_path) == "jsonl"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="say source='code'"):
        infer_source(tmp_path / "empty")
    with pytest.raises(
        ValueError, match=r"x\.csv' is a table: say --data\.source text"
    ):
        infer_source("x.csv")


@pytest.mark.parametrize("name", ["train.bin", "train.npy"])
def test_token_files_are_told_from_text_and_are_no_documents(name, tmp_path):
    (tmp_path / name).write_bytes(bytes(range(64)))
    for path in (tmp_path, tmp_path / name):
        assert infer_source(path) == "tokens"
        with pytest.raises(ValueError, match="holds tokens, and text is needed"):
            list(iter_documents("tokens", path))
    (tmp_path / "input.txt").write_text("text")
    with pytest.raises(
        ValueError, match=r"say which, --data.source text or --data.sou"
    ):
        infer_source(tmp_path)
    (tmp_path / name).rename(tmp_path / f"other{name[-4:]}")
    assert infer_source(tmp_path) == "text"
