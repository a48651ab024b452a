"""A hub on this machine: the part of Hugging Face's protocol that a download needs."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers as hf


class Hub(BaseHTTPRequestHandler):
    """Answers `paths-info`, `tree` and `resolve` of data sets, and whole contents by
    sha1 under `/content/`.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        hub = self.server
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        hub.calls.append(("POST", self.path, None))
        if not self.is_refused():
            paths = parse_qs(body)["paths"]
            self.answer([hub.entry(name) for name in hub.files if name in paths])

    def do_GET(self):
        hub = self.server
        hub.calls.append((self.command, self.path, self.headers["Range"]))
        if self.path.startswith("/content/"):
            data = hub.contents.get(self.path.rpartition("/")[2])
            return self.send(data) if data else self.fail(404)
        if self.is_refused():
            return None
        if "/tree/" in self.path:
            folder = re.sub(r".*/tree/[^/]+/([^?]*).*", r"\1", unquote(self.path))
            names = [name for name in hub.files if name.startswith(folder)]
            return self.answer([hub.entry(name) for name in names])
        name = re.sub(r".*/resolve/[^/]+/([^?]*).*", r"\1", self.path)
        if name not in hub.files:
            return self.fail(404, "EntryNotFound")
        return self.send(hub.files[name], name)

    def is_refused(self):
        if self.server.status != 200:
            self.fail(self.server.status, self.server.code)
        return self.server.status != 200

    def fail(self, status, code=None):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, tree):
        self.send(json.dumps(tree).encode())

    def send(self, data, name=None):
        hub, start = self.server, 0
        if requested := self.headers["Range"]:
            start = int(requested.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            span = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send_header("Content-Range", span)
        if name:
            self.send_header("X-Repo-Commit", hub.revision)
            self.send_header("ETag", f'"{hub.entry(name)["lfs"]["oid"]}"')
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = hub.cuts.pop(name, None) if name else None
        if cut is None:
            self.wfile.write(data[start:])
            return
        self.wfile.write(data[start : start + cut])
        self.wfile.flush()
        hub.is_cut.set()
        hub.go_on.wait(30)
        self.close_connection = True

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """What the hub holds, and how it misbehaves."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hub)
        self.files, self.contents, self.calls, self.cuts = {}, {}, [], {}
        self.stated = {}  # file: a sha256 that is not its own
        self.status, self.code, self.revision = 200, None, "0" * 40
        self.is_cut, self.go_on = threading.Event(), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def entry(self, name):
        sha256 = self.stated.get(name) or hashlib.sha256(self.files[name]).hexdigest()
        size = len(self.files[name])
        lfs = {"oid": sha256, "size": size, "pointerSize": 134}
        return {"type": "file", "path": name, "oid": "1" * 40, "size": size, "lfs": lfs}

    def got(self, command="GET"):
        """Paths and ranges of what was downloaded."""
        return [
            (path.rpartition("/")[2], wanted)
            for kind, path, wanted in self.calls
            if kind == command and "/resolve/" in path
        ]


@pytest.fixture
def data_hub(monkeypatch, tmp_path):
    server = Server()
    server.folder = tmp_path
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    monkeypatch.setenv("TRIX_CONTENTS", f"{server.address}/content/")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield server
    server.go_on.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def shard(table_bytes):
    """Makes a parquet shard with the columns of FineWeb-Edu from texts."""

    def make(texts) -> bytes:
        n = len(texts)
        columns = {
            "text": texts,
            "id": [f"<urn:{i}>" for i in range(n)],
            "dump": ["CC-MAIN-2013-20"] * n,
            "url": ["http://example.org"] * n,
            "file_path": ["s3://x"] * n,
            "language": ["en"] * n,
            "language_score": [0.9] * n,
            "token_count": [len(t.split()) for t in texts],
            "score": [3.0] * n,
            "int_score": [3] * n,
        }
        return table_bytes(columns)

    return make


@pytest.fixture
def table_bytes():
    """Makes a parquet file of columns."""

    def make(columns) -> bytes:
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns), sink, row_group_size=64)
        return sink.getvalue().to_pybytes()

    return make


MARK = "<|endoftext|>"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """Makes a `tokenizer.json` with Hugging Face's library, as people have them."""
    makers = {
        "gpt2": byte_level,
        "llama": byte_fallback,
        "bert": word_pieces,
        "words": words,
    }
    return lambda kind, *args: save(tmp_path_factory, makers[kind](*args))


def save(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def byte_level(special=(MARK, "<|user|>")):
    """As GPT-2's, with a space put before the first word, and cut and padded to 8."""
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the tile that matches a token best"] * 9, trainer)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def byte_fallback():
    """As Llama's: unigrams, bytes for what they lack, `<s>` before each text."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", "\u2581the", "\u2581tile", *"abcdefghijklmnopqrstuvwxyz"]
    scores = [(piece, -float(i)) for i, piece in enumerate(pieces)]
    tokenizer = hf.Tokenizer(hf.models.Unigram(scores, 0, byte_fallback=True))
    tokenizer.normalizer = hf.normalizers.Sequence(
        [hf.normalizers.Prepend("\u2581"), hf.normalizers.Replace(" ", "\u2581")]
    )
    decoders = [
        hf.decoders.Replace("\u2581", " "),
        hf.decoders.ByteFallback(),
        hf.decoders.Fuse(),
        hf.decoders.Strip(" ", 1, 0),
    ]
    tokenizer.decoder = hf.decoders.Sequence(decoders)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = hf.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def word_pieces():
    """As BERT's: small letters, pieces of words, no token for an end."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "tile", "##s", "!"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = hf.Tokenizer(hf.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = hf.normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = hf.decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    return tokenizer


def words(count, unknown):
    """Numbers as words: `w0`, `w1`, ..., and the end mark."""
    vocabulary = {f"w{i}": i for i in range(count)} | {MARK: count}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([MARK])
    return tokenizer
