"""The client of the hub, against a hub on this machine."""

import gzip
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from huggingface_hub import constants

from trix_jax.cli.main import main
from trix_jax.lm.data import download, open_store
from trix_jax.lm.data.datasets import DATASETS, Dataset
from trix_jax.lm.data.download import fetch, folder_of

WORDS = "the tile that matches a token best is the tile which computes it and no other".split()
CHUNK = constants.DOWNLOAD_CHUNK_SIZE  # the client writes so much at a time
FIRST = "sample/10BT/000_00000.parquet"


def texts(seed, count=400):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=40)) for _ in range(count)]


@pytest.fixture
def dataset():
    files = ("a/0.parquet", "a/1.parquet")
    return Dataset("someone/text", "0" * 40, files, 1000, 300, 0.1)


@pytest.fixture
def served(data_hub, dataset, shard):
    for i, name in enumerate(dataset.files):
        data_hub.files[name] = shard(texts(i))
    return data_hub


def test_fetch_brings_checked_files_once(served, dataset):
    lines = []
    paths = fetch(dataset, lines.append)
    assert [path.read_bytes() for path in paths] == list(served.files.values())
    assert "GB to download" in lines[0]
    calls = len(served.calls)
    download._checked.clear()
    assert fetch(dataset, lines.append) == paths
    assert len(served.calls) == calls, "files that are there need no network"


def test_room_for_all_tokens_of_a_data_set_is_that_of_its_files(
    served, dataset, monkeypatch
):
    whole = dataset._replace(tokens=None)
    size = sum(map(len, served.files.values()))
    usage = shutil.disk_usage("/")._replace(free=2 * size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(download, "GB", 1)
    lines = []
    with pytest.raises(OSError, match=rf"someone/text needs {2 * size}\.00 GB"):
        fetch(whole, lines.append)
    assert f", about {size}.00 GB of tokens after" in lines[0]
    usage = usage._replace(free=2 * size)
    assert len(fetch(whole, lines.append)) == 2


@pytest.mark.slow
def test_fetch_goes_on_in_a_broken_download(served, dataset, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    served.cuts[dataset.files[0]] = 5000
    served.go_on.set()
    paths = fetch(dataset, lambda _: None)
    assert paths[0].read_bytes() == served.files[dataset.files[0]]
    assert ("0.parquet", "bytes=5000-") in served.got()


@pytest.mark.slow
def test_prepare_stopped_by_a_signal_goes_on_where_it_was(
    data_hub, shard, user_env, tmp_path
):
    tail = random.Random(0).randbytes(CHUNK).hex()
    data_hub.files[FIRST] = shard([*texts(0), tail])
    data_hub.cuts[FIRST] = int(1.5 * CHUNK)
    flags = "--data.max-tokens 2000 --data.vocab-size 300 --workdir store".split()
    code = "import sys; from trix_jax.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "prepare", "fineweb_5m", *flags]
    env = user_env | {
        "HF_ENDPOINT": data_hub.address,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    first = subprocess.Popen(
        command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    assert data_hub.is_cut.wait(60)
    deadline = time.monotonic() + 30
    while not _arrived(tmp_path / "cache") and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75, said
    assert "The same command goes on" in said
    data_hub.go_on.set()
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    (resumed,) = (wanted for _, wanted in data_hub.got() if wanted)
    assert resumed == f"bytes={CHUNK}-"
    assert len(open_store(tmp_path / "store").train) == 2000


def _arrived(cache):
    return any(path.stat().st_size for path in cache.rglob("*.partial"))


def test_fetch_refuses_a_file_with_another_hash_and_removes_it(served, dataset):
    served.stated[dataset.files[1]] = "f" * 64
    with pytest.raises(RuntimeError, match=r"a/1\.parquet of someone/text must have"):
        fetch(dataset, lambda _: None)
    assert not (folder_of(dataset) / dataset.files[1]).exists()


def test_fetch_names_a_missing_shard(served, dataset):
    del served.files[dataset.files[1]]
    with pytest.raises(RuntimeError, match=r"has no a/1\.parquet"):
        fetch(dataset, lambda _: None)


@pytest.mark.parametrize(
    ("status", "code", "kind", "sentence"),
    [
        (401, None, ValueError, "HTTP 401.*revoked.*hf auth login"),
        (403, None, ValueError, "HTTP 403.*lacks the permission"),
        (403, "GatedRepo", ValueError, "HTTP 403.*accepted the terms"),
        (404, "RevisionNotFound", RuntimeError, "HTTP 404.*revision 000000000000"),
    ],
)
def test_fetch_says_why_the_hub_refuses(served, dataset, status, code, kind, sentence):
    served.status, served.code = status, code
    with pytest.raises(kind, match=sentence):
        fetch(dataset, lambda _: None)


def test_fetch_refuses_a_disk_that_is_too_small(served, dataset):
    huge = dataset._replace(tokens=10**18)
    with pytest.raises(OSError, match="GB free: set XDG_CACHE_HOME"):
        fetch(huge, lambda _: None)


@pytest.mark.parametrize(
    ("status", "code", "expected"), [(200, 0, 0), (401, None, 2), (200, "absent", 1)]
)
def test_prepare_by_name_exits_with(
    data_hub, shard, tmp_path, capsys, status, code, expected
):
    data_hub.status = status
    if code != "absent":
        data_hub.files[FIRST] = shard(texts(0))
    flags = "--data.max-tokens 2000 --data.vocab-size 300".split()
    argv = ["prepare", "fineweb_5m", *flags, "--workdir", str(tmp_path / "store")]
    assert main(argv) == expected
    if expected == 0:
        store = open_store(tmp_path / "store")
        assert len(store.train) == 2000
        assert DATASETS["fineweb_5m"].revision in store.manifest["source"]
        assert store.manifest["config"]["near_duplicates"] == 0.8


def test_prepare_the_stack_without_access_explains_gate_and_licences(data_hub, capsys):
    data_hub.status, data_hub.code = 403, "GatedRepo"
    assert main(["prepare", "stack_250m"]) == 2
    said = capsys.readouterr().err
    for words in ("accept its terms", "Software Heritage", "licence", "--data.path"):
        assert words in said


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "stack_250m" else [])
        for name in DATASETS
    ],
)
def test_prepare_takes_every_name_end_to_end(data_hub, shard, table_bytes, name):
    dataset = DATASETS[name]
    if dataset.is_code:
        sources = [
            f"def f{i}():\n    return {text!r}\n" for i, text in enumerate(texts(0))
        ]
        ids = [hashlib.sha1(source.encode()).hexdigest() for source in sources]
        data_hub.contents = {
            sha1: gzip.compress(source.encode())
            for sha1, source in zip(ids, sources, strict=True)
        }
        n = len(ids)
        rows = {
            "blob_id": ids,
            "src_encoding": ["UTF-8"] * n,
            "license_type": ["permissive"] * n,
            "is_vendor": [False] * n,
            "is_generated": [False] * n,
            "length_bytes": [len(source) for source in sources],
        }
        data_hub.files["data/Python/train-00000-of-00001.parquet"] = table_bytes(rows)
    else:
        for i, file in enumerate(dataset.files):
            data_hub.files[file] = shard(texts(i, count=100))
    flags = "--data.max-tokens 2000 --data.vocab-size 300".split()
    assert main(["prepare", name, *flags, "--workdir", f"{data_hub.folder}/store"]) == 0
    store = open_store(f"{data_hub.folder}/store")
    assert len(store.train) == 2000
    assert len(store.val) > 0
    assert dataset.revision in store.manifest["source"]
