"""A `tokenizer.json` of one's own: its ids, its end mark, and what is stored of it."""

import json

import numpy as np
import pytest
import tokenizers

from trix_jax.lm.data import (
    ByteTokenizer,
    DataConfig,
    check_typed,
    load_tokenizer,
    open_store,
    own_tokenizer,
    prepare,
)

MARK = "<|endoftext|>"
TEXT = "the tile, 日本 and 🙂 "


def quiet(line):
    pass


def whole(split):
    return split.window(0, len(split)).tolist()


def library(path):
    """Hugging Face's own reading, without what would cut or fill."""
    found = tokenizers.Tokenizer.from_file(str(path))
    found.no_truncation()
    found.no_padding()
    return found


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
def test_ids_are_the_library_s_without_cutting_padding_or_marks(kind, tokenizer_file):
    path = tokenizer_file(kind)
    ours, theirs = load_tokenizer(path), library(path)
    for text in (TEXT, "The tiles! " * 20, ""):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == expected
        assert ours.decode(expected) == theirs.decode(
            expected, skip_special_tokens=False
        )
    assert ours.vocab_size == theirs.get_vocab_size()


@pytest.mark.parametrize(
    ("kind", "before"), [("gpt2", " "), ("llama", "")], ids=["prefix", "bytes"]
)
def test_any_text_comes_back_with_the_space_that_the_file_puts_before(
    kind, before, tokenizer_file
):
    tokenizer = load_tokenizer(tokenizer_file(kind))
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == before + TEXT
    first = next(i for i in range(len(ids)) if "日" in tokenizer.decode(ids[: i + 1]))
    assert tokenizer.decode(ids[:first]).endswith("\ufffd")  # half a character


@pytest.mark.parametrize(("kind", "mark"), [("gpt2", MARK), ("llama", "</s>")])
def test_end_mark_in_a_text_is_text_and_other_special_tokens_are_themselves(
    kind, mark, tokenizer_file
):
    path = tokenizer_file(kind)
    tokenizer, theirs = load_tokenizer(path), library(path)
    assert (tokenizer.mark, tokenizer.eot) == (mark, theirs.token_to_id(mark))
    ids = tokenizer.encode(f"a{mark}b")
    assert tokenizer.eot not in ids
    assert theirs.token_to_id(mark) in theirs.encode(f"a{mark}b").ids  # its own habit
    assert tokenizer.decode(ids).strip() == f"a{mark}b"
    assert tokenizer.decode([tokenizer.eot]) == mark
    if kind == "gpt2":
        user = theirs.token_to_id("<|user|>")
        assert tokenizer.encode("<|user|>").tolist() == [user]


def test_end_mark_is_the_flag_s_else_a_known_name_else_none(tokenizer_file):
    bert = tokenizer_file("bert")
    assert own_tokenizer(bert, None).eot is None
    assert own_tokenizer(bert, "[SEP]").eot == 3
    both = tokenizer_file("gpt2", (MARK, "</s>"))
    with pytest.raises(
        ValueError, match=r"several end marks \(<\|endoftext\|>, </s>\)"
    ):
        own_tokenizer(both, None)
    assert own_tokenizer(both, "</s>").eot == 1
    for wrong in ("nothing", " t"):
        with pytest.raises(ValueError, match=r"must be a token of its own. Those that"):
            own_tokenizer(both, wrong)
    with pytest.raises(ValueError, match="must be a token of its own"):
        own_tokenizer(both, "th")  # merged from text


def test_unknown_text_never_becomes_the_end_mark(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file("words", 5, MARK))
    assert tokenizer.encode("w1 w4").tolist() == [1, 4]
    with pytest.raises(ValueError, match="must not give its end mark"):
        tokenizer.encode("w1 what")
    mute = load_tokenizer(tokenizer_file("words", 5, "[UNK]"))
    with pytest.raises(ValueError, match="the tokenizer cannot encode it: WordLevel"):
        mute.encode("what")


@pytest.mark.parametrize(
    ("kind", "mark"), [("gpt2", None), ("llama", None), ("bert", "[SEP]")]
)
def test_saved_file_reads_back_as_the_same(kind, mark, tokenizer_file, tmp_path):
    first = own_tokenizer(tokenizer_file(kind), mark)
    first.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.content() == first.content()
    assert again.eot == first.eot
    assert again.encode(TEXT).tolist() == first.encode(TEXT).tolist()
    if mark is None:  # it is Hugging Face's file again
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        ids = theirs.encode(TEXT, add_special_tokens=False).ids
        assert ids == first.encode(TEXT).tolist()


def test_bytes_of_tokens_are_those_of_their_text(tokenizer_file):
    tokenizer = load_tokenizer(tokenizer_file("gpt2"))
    sizes = tokenizer.token_bytes()
    ids = tokenizer.encode(TEXT)
    assert sizes[ids].sum() == len((" " + TEXT).encode())
    assert sizes[tokenizer.eot] == sizes[1] == 0
    assert load_tokenizer(tokenizer_file("llama")).token_bytes() is None
    assert ByteTokenizer().token_bytes().tolist() == [1] * 256 + [0]


def test_prepared_store_holds_the_file_s_ids_and_the_text_s_bytes(
    tokenizer_file, tmp_path
):
    path, said = tokenizer_file("gpt2"), []
    texts = [f"{TEXT}{i}" for i in range(40)] + [f"a {MARK} b"]
    config = DataConfig(
        "jsonl", write_jsonl(tmp_path / "a.jsonl", texts), tokenizer=str(path)
    )
    store = prepare(config, tmp_path / "store", said.append)
    theirs = library(path)
    both = store.tokenizer.decode(whole(store.train) + whole(store.val)).split(MARK)
    spelled = [part for part in both if part not in (" a ", " b", "")]
    assert sorted(part.removeprefix(" ") for part in spelled) == sorted(texts[:-1])
    counts = [theirs.token_to_id(MARK) in (i,) for i in whole(store.train)]
    counts += [theirs.token_to_id(MARK) in (i,) for i in whole(store.val)]
    assert sum(counts) == 41
    total = store.manifest["splits"]["train"]["bytes"] + store.val_bytes
    assert total == sum(len(text.encode()) for text in texts)
    assert any("text spells the end mark <|endoftext|> 1 time(s)" in s for s in said)
    assert not any("does not give text back" in line for line in said)


def test_store_of_more_than_65536_ids_holds_them(tokenizer_file, tmp_path):
    path = tokenizer_file("words", 70_000, MARK)
    texts = [f"w{i} w{69_999 - i}" for i in range(40)]
    config = DataConfig(
        "jsonl", write_jsonl(tmp_path / "a.jsonl", texts), tokenizer=str(path)
    )
    store = prepare(config, tmp_path / "store", quiet)
    assert store.tokenizer.vocab_size == 70_001
    ids = whole(store.train) + whole(store.val)
    lines = [[i, 69_999 - i, 70_000] for i in range(40)]
    assert sorted(map(tuple, np.reshape(ids, (-1, 3)).tolist())) == sorted(
        map(tuple, lines)
    )
    assert np.load(tmp_path / "store" / "train_00000.npy").dtype == np.uint32


def test_several_documents_need_an_end_mark_and_one_does_not(tokenizer_file, tmp_path):
    path, said = str(tokenizer_file("bert")), []
    data = write_jsonl(tmp_path / "a.jsonl", ["The tiles! " * 9, "the tile " * 9] * 9)
    config = DataConfig("jsonl", data, tokenizer=path)
    with pytest.raises(ValueError, match=r"say which one does, --data.end-of-text TOK"):
        prepare(config, tmp_path / "store", quiet)
    config = DataConfig("jsonl", data, tokenizer=path, end_of_text="[SEP]")
    store = prepare(config, tmp_path / "store", said.append)
    assert store.tokenizer.eot == 3
    assert open_store(tmp_path / "store").tokenizer.eot == 3
    assert any("does not give text back as it was ('The" in line for line in said)
    (tmp_path / "one.txt").write_text("the tile " * 40)
    one = DataConfig("text", str(tmp_path / "one.txt"), tokenizer=path)
    assert whole(prepare(one, tmp_path / "one", quiet).val) == [4, 5] * 4


def test_tokenizer_is_compared_by_content_and_a_changed_file_is_told(
    tokenizer_file, tmp_path
):
    source, said = tokenizer_file("gpt2"), []
    path, other = tmp_path / "tokenizer.json", tmp_path / "other.json"
    path.write_bytes(source.read_bytes())
    other.write_text(
        json.dumps(json.loads(path.read_text()))
    )  # the same, otherwise put
    data = write_jsonl(tmp_path / "a.jsonl", [f"tile {i}" for i in range(40)])
    store = tmp_path / "store"
    made = prepare(DataConfig("jsonl", data, tokenizer=str(path)), store, quiet)
    same = DataConfig("jsonl", data, tokenizer=str(other))
    assert prepare(same, store, quiet).fingerprint == made.fingerprint
    beside = DataConfig("jsonl", str(store), tokenizer=str(other))
    check_typed(beside, ["--data.tokenizer", str(other), "--data.path", str(store)])
    with pytest.raises(
        ValueError, match=r"--data.tokenizer byte is not what the store"
    ):
        check_typed(
            DataConfig("jsonl", str(store)), ["--data.tokenizer=byte", "--data.path"]
        )
    path.write_bytes(tokenizer_file("gpt2", (MARK,)).read_bytes())
    config = DataConfig("jsonl", data, tokenizer=str(path))
    with pytest.raises(ValueError, match=r"tokenizer\.json changed"):
        prepare(config, store, quiet)
    assert prepare(config, store, said.append, changed="tell").fingerprint
    assert any("tokenizer.json changed. It is used as it is" in line for line in said)
    path.unlink()
    assert prepare(config, store, quiet).fingerprint == made.fingerprint


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_store_s_own_file_serves_another_corpus(kind, tmp_path):
    data = write_jsonl(
        tmp_path / "a.jsonl", [f"tile {i} 0123456789" for i in range(60)]
    )
    config = DataConfig("jsonl", data, tokenizer=kind, vocab_size=270)
    first = prepare(config, tmp_path / "first", quiet)
    data = write_jsonl(tmp_path / "b.jsonl", [f"title {i}" for i in range(60)])
    again = DataConfig("jsonl", data, tokenizer=str(tmp_path / "first"))
    second = prepare(again, tmp_path / "second", quiet)
    assert second.tokenizer.content() == first.tokenizer.content()
    names = [tmp_path / name / "tokenizer.json" for name in ("first", "second")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_name_that_is_no_tokenizer_is_refused(tmp_path):
    config = DataConfig(tokenizer="bep")
    with pytest.raises(
        ValueError, match=r"char, byte, bpe or the path of a tokenizer.j"
    ):
        prepare(config, tmp_path / "store", quiet)
    config = DataConfig(end_of_text="</s>")
    with pytest.raises(ValueError, match="tokenizer=byte has its own"):
        prepare(config, tmp_path / "store", quiet)
    with pytest.raises(ValueError, match="is not a readable tokenizer file"):
        own_tokenizer(tmp_path, None)
