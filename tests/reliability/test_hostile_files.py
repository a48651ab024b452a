"""Files that were changed at random, or made to harm: a ValueError with a sentence, or
the file's own content.

No other exception, no hang (pytest's time limit), no allocation beyond the limit of
address space set here.
"""

import hashlib
import json
import resource
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trix_jax.lm.checkpoint import checkpoint
from trix_jax.lm.config import read_yaml
from trix_jax.lm.data import iter_documents, load_tokenizer, open_store
from trix_jax.lm.presets import preset_flags, to_flags
from trix_jax.lm.serve.load import load_run

GIBIBYTES = 2**30
fuzzed = settings(
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(
            st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)
        ),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("end"), st.floats(0, 1), st.none()),
    ),
    min_size=1,
    max_size=4,
)


def changed(data, edits):
    data = bytearray(data)
    for kind, where, value in edits:
        at = int(where * max(len(data) - 1, 0))
        if kind == "set" and data:
            data[at] = value
        elif kind == "insert":
            data[at:at] = value
        elif kind == "cut":
            del data[at : at + value]
        elif kind == "end":
            del data[at:]
    return bytes(data)


@pytest.fixture(autouse=True)
def little_memory():
    """A reader that believes a length in a file meets a MemoryError, which is no
    ValueError.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * GIBIBYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def said(action, *args):
    """The sentence of a refusal, "" where there was none."""
    try:
        action(*args)
    except ValueError as error:
        return str(error) or "no sentence at all"
    return ""


PRESET = yaml.safe_dump(
    {
        "model": {"d_model": 16, "dropout": 0.1},
        "arms": {"dense": {"model.ffn": "dense"}},
    }
).encode()


@fuzzed
@given(edits=EDITS)
def test_changed_preset(tmp_path, edits):
    path = tmp_path / "preset.yaml"
    path.write_bytes(changed(PRESET, edits))
    said(preset_flags, path, "dense")


@fuzzed
@given(text=st.text(alphabet="{}[]:,-&*!|>'\"%@#?\n\t ab01.~\0", max_size=40))
def test_preset_of_yaml_signs(tmp_path, text):
    path = tmp_path / "preset.yaml"
    path.write_text(text, encoding="utf-8")
    said(lambda: to_flags(read_yaml(path)))


def test_preset_of_a_billion_laughs_is_refused(tmp_path):
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}" for i in range(1, 60)]
    (tmp_path / "preset.yaml").write_text("\n".join(lines))
    assert "it has an alias" in said(read_yaml, tmp_path / "preset.yaml")


@fuzzed
@given(edits=EDITS)
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_changed_tokenizer(tmp_path, kind, edits, corpus):
    from trix_jax.lm.data import CharTokenizer, train_bpe

    sound = tmp_path / "sound.json"
    if not sound.exists():
        text = "to be or not to be"
        made = CharTokenizer(text) if kind == "char" else train_bpe([text], 262)
        made.save(sound)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(changed(sound.read_bytes(), edits))
    said(lambda: load_tokenizer(path).encode("to be"))


def signed(manifest):
    """A manifest with a checksum that is right, as somebody who means harm would make
    it.
    """
    rest = {k: v for k, v in manifest.items() if k != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "checksum": hashlib.sha256(text.encode()).hexdigest()}


@fuzzed
@given(edits=EDITS)
def test_changed_shard_under_a_right_manifest(tmp_path, run_dir, edits):
    store = tmp_path / "store"
    if not store.exists():
        shutil.copytree(run_dir / "data", store)
    name = "train_00000.npy"
    sound = (run_dir / "data" / name).read_bytes()
    head = changed(sound[:140], edits)  # the header and the first tokens
    (store / name).write_bytes(head + sound[140:])
    manifest = json.loads((run_dir / "data" / "manifest.json").read_text())
    data = (store / name).read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest["files"][name] |= entry
    (store / "manifest.json").write_text(json.dumps(signed(manifest)))
    refused = said(open_store, store)
    assert not refused or name in refused
    if not refused:
        opened = open_store(store)
        tokens = opened.train.window(0, len(opened.train))
        assert tokens.max() < opened.tokenizer.vocab_size


@pytest.mark.parametrize(
    "name", ["../train_00000.npy", "/etc/passwd", "train_00000.npy/../x", "a\0b"]
)
def test_store_manifest_that_leads_elsewhere_is_refused(tmp_path, run_dir, name):
    store = tmp_path / "store"
    shutil.copytree(run_dir / "data", store)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["files"][name] = manifest["files"]["train_00000.npy"]
    (store / "manifest.json").write_text(json.dumps(signed(manifest)))
    assert "which is no file of a store" in said(open_store, store)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("|O", (2,)), ("<u2", (2, 2)), ("<f8", (3,)), ("<u2", (2**60,)), ("<u2", (-1,))],
)
def test_shard_of_objects_or_of_another_kind_is_refused(tmp_path, run_dir, kind, shape):
    store, name = tmp_path / "store", "val_00000.npy"
    shutil.copytree(run_dir / "data", store)
    with (store / name).open("wb") as file:
        header = {"descr": kind, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(64))
    data = (store / name).read_bytes()
    manifest = json.loads((store / "manifest.json").read_text())
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest["files"][name] |= entry
    (store / "manifest.json").write_text(json.dumps(signed(manifest)))
    assert name in said(open_store, store)


@settings(parent=fuzzed, max_examples=25)
@given(data=st.data())
def test_changed_notes_of_a_checkpoint_are_named(tmp_path, run_dir, data):
    run = tmp_path / "run"
    if not run.exists():
        shutil.copytree(run_dir, run)
    name = data.draw(st.sampled_from(["manifest.json", "meta.json", "leaves.json"]))
    file = run / "checkpoints" / "00000010" / name
    sound = file.read_bytes()
    file.write_bytes(changed(sound, data.draw(EDITS)))
    differs = file.read_bytes() != sound
    refused = said(checkpoint.resolve, run / "checkpoints", 10)
    same_json = differs and name == "manifest.json" and not refused
    if same_json:
        assert json.loads(file.read_bytes()) == json.loads(sound)
    else:
        assert bool(refused) == differs
    file.write_bytes(sound)


@pytest.fixture(scope="module")
def packed(run_dir, tmp_path_factory):
    from trix_jax.lm.serve.export import export

    directory = tmp_path_factory.mktemp("packed")
    export(*load_run(run_dir), directory)
    return directory


@settings(parent=fuzzed, max_examples=25)
@given(edits=EDITS)
def test_changed_safetensors(tmp_path, packed, edits):
    path = tmp_path / "model.safetensors"
    if not path.exists():
        shutil.copytree(packed, tmp_path, dirs_exist_ok=True)
    sound = (packed / "model.safetensors").read_bytes()
    header = int.from_bytes(sound[:8], "little") + 8
    path.write_bytes(changed(sound[:header], edits) + sound[header:])
    refused = said(load_run, tmp_path)
    assert not refused or "model.safetensors" in refused


@fuzzed
@given(edits=EDITS)
def test_changed_parquet(tmp_path, edits):
    sound = tmp_path / "sound.parquet"
    if not sound.exists():
        table = pyarrow.table({"text": ["to be", "or not", "to be"] * 20})
        pyarrow.parquet.write_table(table, sound)
    path = tmp_path / "changed.parquet"
    path.write_bytes(changed(sound.read_bytes(), edits))
    refused = said(lambda: list(iter_documents("parquet", path)))
    assert not refused or str(path) in refused


@fuzzed
@given(edits=EDITS)
def test_changed_jsonl(tmp_path, edits):
    sound = b"".join(
        json.dumps({"text": f"line {i} \u00e9"}).encode() + b"\n" for i in range(9)
    )
    path = tmp_path / "changed.jsonl"
    path.write_bytes(changed(sound, edits))
    refused = said(lambda: list(iter_documents("jsonl", path)))
    assert not refused or str(path) in refused
