"""Token files of one's own: which ids a store has of them, and what is refused."""

import math

import numpy as np
import pytest

from trix_jax.lm.data import (
    DataConfig,
    check_typed,
    load_tokenizer,
    made_with,
    open_store,
    prepare,
)
from trix_jax.lm.data.token_files import find

IDS = np.arange(200) * 7 % 61


def quiet(line):
    pass


def whole(split):
    return split.window(0, len(split)).tolist()


def llm_c(ids, magic=20240520, version=1, kind="<u2"):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids)
    return header.tobytes() + np.asarray(ids).astype(kind).tobytes()


def write_npy(path, ids, kind):
    path.parent.mkdir(exist_ok=True)
    np.save(path, np.asarray(ids).astype(kind))
    return path


@pytest.fixture
def nanogpt(tmp_path):
    """`train.bin` and `val.bin`, as nanoGPT's `prepare.py` leaves them."""
    folder = tmp_path / "data"
    folder.mkdir()
    IDS[:160].astype(np.uint16).tofile(folder / "train.bin")
    IDS[160:].astype(np.uint16).tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"never opened")
    return folder


@pytest.mark.parametrize("name", ["", "train.bin"])
def test_nanogpt_s_files_are_the_two_sides(name, nanogpt, tmp_path):
    said = []
    config = DataConfig(path=str(nanogpt / name))
    store = prepare(config, tmp_path / "store", said.append)
    assert whole(store.train) == IDS[:160].tolist()
    assert whole(store.val) == IDS[160:].tolist()
    assert store.tokenizer.vocab_size == 61
    assert (store.tokenizer.kind, store.tokenizer.eot) == ("none", None)
    assert store.val_bytes is None
    assert any("bits per byte are not known" in line for line in said)
    assert any("no end mark is known" in line for line in said)
    names = [entry["name"] for entry in store.manifest["sources"]["files"]]
    assert names == ["train.bin", "val.bin"]
    again = prepare(config, tmp_path / "store", quiet)
    assert again.fingerprint == store.fingerprint


@pytest.mark.parametrize(
    "kind", ["<u2", "<i4", "<i8", "<u8", ">u2", "int8"], ids=lambda kind: kind
)
def test_npy_of_any_integers_is_read(kind, tmp_path):
    path = write_npy(tmp_path / "ids.npy", IDS, kind)
    store = prepare(DataConfig(path=str(path)), tmp_path / "store", quiet)
    assert whole(store.train) + whole(store.val) == IDS.tolist()
    assert len(store.val) == 20  # a tenth, from the end


@pytest.mark.parametrize(
    ("magic", "version", "kind"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")]
)
def test_llm_c_s_header_is_no_token(magic, version, kind, tmp_path):
    ids = IDS + 70_000 * (kind == "<u4")
    names = {"x_train_000001": ids[:80], "x_train_000002": ids[80:160]}
    names |= {"x_val_000000": ids[160:]}
    for name, part in names.items():
        data = llm_c(part, magic, version, kind)
        (tmp_path / f"{name}.bin").write_bytes(data)
    store = prepare(DataConfig(path=str(tmp_path)), tmp_path / "store", quiet)
    assert whole(store.train) == ids[:160].tolist()
    assert whole(store.val) == ids[160:].tolist()
    shard = np.load(tmp_path / "store" / "val_00000.npy")
    assert shard.dtype == (np.uint16 if kind == "<u2" else np.uint32)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.bin", b"odd", r"must hold uint16, two bytes a token.* Got 3 bytes"),
        ("a.bin", b"", "holds no tokens"),
        ("a.bin", IDS.astype("<u4").tobytes(), "as in a file of wider integers"),
        ("a.bin", IDS.astype("<i8").tobytes(), "as in a file of wider integers"),
        ("a.bin", (IDS * 2000).astype("<u4").tobytes(), "as in a file of wider"),
        (
            "a.bin",
            np.where(np.arange(200) % 50, IDS, -1).astype("<i4").tobytes(),
            "as in a file of wider integers",
        ),
        ("a.bin.gz", b"packed", "must be a .bin or .npy file of tokens, not packed"),
        ("a.bin", b"PK\x03\x04" + bytes(60), "it is a PyTorch or zip file"),
        (
            "a.bin",
            llm_c(IDS)[:-2],
            r"must have 1424 bytes for the 200 tokens .* Got 1422",
        ),
        ("a.bin", llm_c(IDS, version=2), "must be of version 1. Got 2"),
        ("a.npy", b"no array", "is not a readable .npy file"),
    ],
)
def test_file_of_another_format_is_named(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    config = DataConfig(path=str(tmp_path / name))
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "store", quiet)
    assert not (tmp_path / "store").exists()


def test_arrays_that_are_no_line_of_integers_and_megatron_s_are_named(tmp_path):
    for array in (np.zeros(9), np.zeros((3, 3), int)):
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=r"a\.npy must hold a line of integers"):
            prepare(DataConfig(path=str(tmp_path / "a.npy")), tmp_path / "s", quiet)
    with (tmp_path / "a.npy").open("wb") as file:  # of Python's objects
        header = {"descr": "|O", "fortran_order": False, "shape": (1,)}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match=r"a\.npy is not a readable .npy file"):
        prepare(DataConfig(path=str(tmp_path / "a.npy")), tmp_path / "s", quiet)
    for name in ("m.bin", "m.idx"):
        (tmp_path / name).write_bytes(bytes(8))
    with pytest.raises(ValueError, match="is of Megatron"):
        prepare(DataConfig(path=str(tmp_path / "m.bin")), tmp_path / "s", quiet)


def test_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path, tokenizer_file):
    path = write_npy(tmp_path / "a.npy", [1, 2, 70, 3], "<i4")
    config = DataConfig(path=str(path), vocab_size=70)
    message = (
        r"a\.npy must hold ids in 0 to 69, below vocab_size=70. Got 70 at position 2"
    )
    with pytest.raises(ValueError, match=message):
        prepare(config, tmp_path / "store", quiet)
    config = DataConfig(path=str(path), tokenizer=str(tokenizer_file("words", 5, None)))
    with pytest.raises(
        ValueError, match=r"in 0 to 5, those of tokenizer\.json. Got 70"
    ):
        prepare(config, tmp_path / "store", quiet)
    write_npy(path, [1, -2], "<i4")
    with pytest.raises(ValueError, match=r"Got -2 at position 1"):
        prepare(DataConfig(path=str(path)), tmp_path / "store", quiet)


def test_vocabulary_and_end_mark_are_the_flags(tmp_path):
    path = write_npy(tmp_path / "a.npy", [*([1, 2, 3, 9] * 20), 1, 2, 9, 5], "<i4")
    config = DataConfig(path=str(path), vocab_size=100, end_of_text="9")
    store = prepare(config, tmp_path / "store", quiet)
    assert (store.tokenizer.vocab_size, store.tokenizer.eot) == (100, 9)
    assert store.tokenizer.decode([3, 9]) == "3 9"
    assert whole(store.val) == [1, 2, 3, 9, 1, 2, 9, 5]  # from a document's first token
    assert open_store(tmp_path / "store").tokenizer.eot == 9
    with pytest.raises(ValueError, match=r"text has no ids here. Give ids"):
        store.tokenizer.encode("text")
    for wrong, message in (
        ("<eos>", "must be an id where"),
        ("100", "an id below 100"),
    ):
        config = DataConfig(path=str(path), vocab_size=100, end_of_text=wrong)
        with pytest.raises(ValueError, match=message):
            prepare(config, tmp_path / "other", quiet)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bytes_of_tokens_with_a_tokenizer_are_those_of_their_text(
    kind, tokenizer_file, tmp_path
):
    path = tokenizer_file(kind)
    tokenizer = load_tokenizer(path)
    texts = [f"the tile, 日本 {'🙂' * (i % 3)} {i}" for i in range(30)]
    line = [np.append(tokenizer.encode(text), tokenizer.eot) for text in texts]
    write_npy(tmp_path / "train.npy", np.concatenate(line[:20]), "<u2")
    write_npy(tmp_path / "val.npy", np.concatenate(line[20:]), "<u2")
    config = DataConfig(path=str(tmp_path), tokenizer=str(path))
    store = prepare(config, tmp_path / "store", quiet)
    before = kind == "gpt2"  # the space before the first word, which its ids hold
    sizes = [len(text.encode()) + before for text in texts]
    assert store.manifest["splits"]["train"]["bytes"] == sum(sizes[:20])
    assert store.val_bytes == sum(sizes[20:])
    assert store.tokenizer.content() == tokenizer.content()


def test_val_path_share_and_max_tokens(tmp_path):
    train, val = write_npy(tmp_path / "a.npy", IDS, "<u2"), tmp_path / "b.bin"
    IDS[:30].astype(np.uint16).tofile(val)
    config = DataConfig(path=str(train), val_path=str(val), max_tokens=50)
    store = prepare(config, tmp_path / "one", quiet)
    assert whole(store.train) == IDS[:50].tolist()
    assert whole(store.val) == IDS[:30].tolist()
    config = DataConfig(path=str(train), val_fraction=0.25, max_tokens=70)
    store = prepare(config, tmp_path / "two", quiet)
    assert whole(store.train) == IDS[:70].tolist()
    assert whole(store.val) == IDS[150:].tolist()
    for text in ("text.txt", "folder"):
        (tmp_path / "text.txt").write_text("text")
        config = DataConfig(path=str(train), val_path=str(tmp_path / text))
        with pytest.raises(
            ValueError, match=r"must hold \.bin or \.npy files|no token"
        ):
            prepare(config, tmp_path / "three", quiet)


def test_changed_files_are_told_and_those_that_are_gone_are_as_they_were(
    nanogpt, tmp_path
):
    config = DataConfig(path=str(nanogpt))
    store = prepare(config, tmp_path / "store", quiet)
    IDS[:40].astype(np.uint16).tofile(nanogpt / "val.bin")
    with pytest.raises(ValueError, match=r"val\.bin changed"):
        prepare(config, tmp_path / "store", quiet)
    rebuilt = prepare(config, tmp_path / "store", quiet, changed="rebuild")
    assert whole(rebuilt.val) == IDS[:40].tolist()
    for path in nanogpt.iterdir():
        path.unlink()
    nanogpt.rmdir()
    assert prepare(config, tmp_path / "store", quiet).fingerprint != store.fingerprint


def test_flags_of_text_are_refused_and_a_store_knows_what_it_is(nanogpt, tmp_path):
    path = str(nanogpt)
    with pytest.raises(ValueError, match=r"max_bytes is of text, and .* holds tokens"):
        prepare(DataConfig(path=path, max_bytes=9), tmp_path / "store", quiet)
    with pytest.raises(ValueError, match=r"--data.tokenizer bpe makes tokens of text"):
        check_typed(DataConfig(path=path, tokenizer="bpe"), ["--data.tokenizer", "bpe"])
    check_typed(DataConfig(path=path, tokenizer="bpe"), ["--data.path", path])
    store = prepare(DataConfig(path=path, tokenizer="bpe"), tmp_path / "store", quiet)
    made = made_with(store, str(tmp_path / "store"))
    assert (made.source, made.tokenizer, made.vocab_size) == ("tokens", "none", 61)
    with pytest.raises(ValueError, match="source='tokens' needs a path"):
        prepare(DataConfig(source="tokens"), tmp_path / "other", quiet)
    with pytest.raises(ValueError, match="tokenizer=none is of token files"):
        prepare(DataConfig(tokenizer="none"), tmp_path / "other", quiet)


def test_too_many_ids_for_uint16_need_another_file(tokenizer_file, nanogpt, tmp_path):
    path = tokenizer_file("words", 66_000, None)
    config = DataConfig(path=str(nanogpt), tokenizer=str(path))
    with pytest.raises(
        ValueError, match=r"train\.bin holds uint16, too few for the 66,001"
    ):
        prepare(config, tmp_path / "store", quiet)


def test_evaluation_without_text_has_no_bits_per_byte(nanogpt, tmp_path):
    """And with it, the loss in nats per token over ln 2 and the bytes of a token."""
    from trix_jax.lm.train.evaluate import _bits_per_byte

    store = prepare(DataConfig(path=str(nanogpt)), tmp_path / "store", quiet)
    assert _bits_per_byte(1.0, store) is None
    manifest = {**store.manifest, "splits": {"val": {"tokens": 40, "bytes": 160}}}
    assert _bits_per_byte(math.log(2), store._replace(manifest=manifest)) == 0.25


@pytest.mark.parametrize("is_by_folder", [True, False])
def test_validation_is_no_training_whatever_its_path_is_called(
    is_by_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    inside = {"train": "train/0.bin", "val": "val/0.bin"}
    names = inside if is_by_folder else {"train": "a.bin", "val": "b.bin"}
    for side, part in (("train", IDS[:160]), ("val", IDS[160:])):
        file = tmp_path / "d" / names[side]
        file.parent.mkdir(parents=True, exist_ok=True)
        part.astype(np.uint16).tofile(file)
    val = None if is_by_folder else str(tmp_path / "d" / "b.bin")
    config = DataConfig(source="tokens", path="d", val_path=val)
    store = prepare(config, tmp_path / "store", quiet)
    assert whole(store.train) == IDS[:160].tolist()
    assert whole(store.val) == IDS[160:].tolist()


def test_a_folder_of_text_and_training_tokens_is_named_by_its_user(tmp_path):
    IDS.astype(np.uint16).tofile(tmp_path / "fineweb_train_000001.bin")
    (tmp_path / "README.txt").write_text("about them")
    with pytest.raises(ValueError, match=r"holds text .* and tokens"):
        prepare(DataConfig(path=str(tmp_path)), tmp_path / "store", quiet)


def test_more_words_count_beside_a_name_that_says_train(tmp_path):
    for name in ("a", "dev", "eval"):
        write_npy(tmp_path / "one" / f"{name}.npy", IDS, "<u2")
        write_npy(tmp_path / "two" / f"{name}.npy", IDS, "<u2")
    write_npy(tmp_path / "two" / "train.npy", IDS[:50], "<u2")
    one, two = (find(tmp_path / name, quiet) for name in ("one", "two"))
    assert [p.stem for p in one.train] == ["a", "dev", "eval"]
    assert ([p.stem for p in two.train], [p.stem for p in two.val]) == (
        ["a", "train"],
        ["dev"],
    )
    named = find(tmp_path / "two" / "train.npy", quiet)
    assert [p.stem for p in named.files] == ["train", "dev"]
