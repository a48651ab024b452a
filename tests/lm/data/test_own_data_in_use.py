"""A tokenizer and token files of one's own, from the command line to the export."""

import itertools
import json
import math

import numpy as np
import pytest

from trix_jax.cli.generate import texts
from trix_jax.cli.main import main
from trix_jax.lm.data import ByteTokenizer, IdTokenizer, load_tokenizer, open_store
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train.evaluate import evaluate

SMALL = (
    "--model.ffn sparse --model.context 16 --model.d-model 16 --model.n-layers 1 "
    "--model.n-heads 2 --model.num-tiles 4 --train.steps 2 --train.batch-size 8"
).split()


def run(capsys, *argv):
    """The JSON line of a verb that ends well."""
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "prompt", "tail"),
    [
        ("gpt2", "the tile", " that 日本 🙂"),
        ("llama", "the tile", " 日本 🙂 the"),
        ("bert", "The Tile", "s!"),
    ],
)
def test_generated_text_is_the_prompt_as_typed_and_whole_characters(
    kind, prompt, tail, tokenizer_file
):
    tokenizer = load_tokenizer(tokenizer_file(kind))
    ids = tokenizer.encode(prompt).tolist()
    new = tokenizer.encode(prompt + tail).tolist()[len(ids) :]
    shown = list(texts(tokenizer, prompt, ids, new))
    assert shown[0] == prompt
    assert shown[-1] == prompt + tail
    assert all(b.startswith(a) for a, b in itertools.pairwise(shown))
    assert not any("\ufffd" in text for text in shown)
    assert ids == tokenizer.encode(prompt + tail).tolist()


def test_generated_text_that_ends_inside_a_character_says_so():
    ids = [104]
    assert list(texts(ByteTokenizer(), "h", ids, [0xC3])) == ["h", "h\ufffd"]
    assert list(texts(ByteTokenizer(), "h", [104], [0xC3, 0xA9])) == ["h", "hé"]
    assert list(texts(ByteTokenizer(), None, [104, 0xC3], [])) == ["h", "h\ufffd"]
    shown = texts(ByteTokenizer(), None, [104, 0xC3], [0xA9, 0x21])
    assert list(shown) == ["h", "hé", "hé!"]
    shown = texts(ByteTokenizer(), None, [0xF0, 0x9F, 0x98], [0x80])
    assert list(shown) == ["", "😀"]
    assert list(texts(IdTokenizer(9), None, [1, 2], [3])) == ["1 2", "1 2 3"]


@pytest.mark.slow
def test_own_tokenizer_from_training_to_the_export(
    tokenizer_file, corpus, capsys, tmp_path
):
    path, work = tokenizer_file("gpt2"), tmp_path / "run"
    data = ["--data.path", corpus, "--data.tokenizer", path]
    run(capsys, "train", "--workdir", work, *data, *SMALL)
    found = run(capsys, "eval", "--checkpoint", work)
    store = open_store(work / "data")
    tokens_a_byte = store.val_tokens / store.val_bytes
    expected = found["val_loss"] * tokens_a_byte / math.log(2)
    assert found["val_bits_per_byte"] == pytest.approx(expected)
    assert store.val_bytes == round(0.1 * len(corpus.read_bytes()))
    prompt = ["--prompt", "the tile", "--tokens", 5]
    said = run(capsys, "generate", "--checkpoint", work, *prompt)
    assert said["text"].startswith("the tile")
    own = load_tokenizer(path).encode("the tile").tolist()
    assert said["ids"][: len(own)] == own
    path.rename(tmp_path / "gone.json")  # the run has its own
    assert main(["train", "--workdir", str(work), *map(str, data), *SMALL]) == 0
    out = tmp_path / "out"
    run(capsys, "export", "--checkpoint", work, "--output", out, "--card")
    of = ["generate", "--checkpoint", out, *prompt]
    assert run(capsys, *of)["text"] == said["text"]
    assert run(capsys, *of, "--wide")["text"] == said["text"]
    of_run = ["generate", "--checkpoint", work, *prompt, "--wide"]
    assert main([*map(str, of_run)]) == 2
    assert "wide needs an export" in capsys.readouterr().err
    again = run(capsys, "eval", "--checkpoint", out, "--data", work / "data")
    assert again["val_bits_per_byte"] == found["val_bits_per_byte"]
    assert load_run(out)[2].content() == load_run(work)[2].content()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_own_tokenizer_in_the_harness(tokenizer_file, corpus, capsys, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from trix_jax.lm.serve.harness import TrixLM

    work = tmp_path / "run"
    data = ["--data.path", corpus, "--data.tokenizer", tokenizer_file("llama")]
    run(capsys, "train", "--workdir", work, *data, *SMALL)
    adapter = TrixLM(work, batch=2)
    model, variables, tokenizer = load_run(work)
    pair = ("the tile ", "that")
    ((value, _),) = adapter.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    ids = [2, *tokenizer.encode("the tile that").tolist()]
    first = 1 + len(tokenizer.encode("the tile"))
    logits = np.asarray(model.apply(variables, np.asarray(ids[:-1])[None])[0][0])
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(log_p[i - 1, ids[i]] for i in range(first, len(ids)))
    assert value == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_token_files_without_a_tokenizer_from_training_to_the_export(capsys, tmp_path):
    data, work = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    ids = np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16)
    ids[:1800].tofile(data / "train.bin")
    ids[1800:].tofile(data / "val.bin")
    summary = run(capsys, "train", "--workdir", work, "--data.path", data, *SMALL)
    assert summary["final_val_bits_per_byte"] is None
    report = (work / "REPORT.md").read_text()
    assert "| bits per byte, last | not known |" in report
    found = run(capsys, "eval", "--checkpoint", work)
    assert (found["val_bits_per_byte"], found["tokens"]) == (None, 199)
    assert main(["eval", "--checkpoint", str(work)]) == 0
    assert "bits per byte not known" in capsys.readouterr().out
    assert main(["generate", "--checkpoint", str(work), "--prompt", "a"]) == 2
    assert "Give ids (generate --prompt-ids)" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(work)]) == 2
    given = ["--prompt-ids", 1, 2, 3, "--tokens", 4]
    said = run(capsys, "generate", "--checkpoint", work, *given)
    assert (said["text"], said["ids"][:3], len(said["ids"])) == (None, [1, 2, 3], 7)
    out = tmp_path / "out"
    run(capsys, "export", "--checkpoint", work, "--output", out, "--card")
    assert "| not known |" in (out / "README.md").read_text()
    assert run(capsys, "generate", "--checkpoint", out, *given)["ids"] == said["ids"]
    model, variables, _ = load_run(work)
    result = evaluate(model, variables, open_store(work / "data"))
    assert result.val_bits_per_byte is None
    assert result.val_loss == found["val_loss"]
