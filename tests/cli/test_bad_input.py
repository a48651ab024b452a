"""Every mistake a user can make has its own sentence and exit code 2, whatever the
verb.
"""

import json
import shutil

import numpy as np
import pytest
import yaml

from trix_jax.cli import main

SIZES = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 16 "
    "--model.num-tiles 4 --model.tiles-per-cluster 2 --train.batch-size 8 "
    "--data.tokenizer char --train.steps 2 --train.eval-every 2"
).split()

pytestmark = pytest.mark.usefixtures("no_type_hook")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "input.txt"
    path.write_text("\n".join(f"{i} is {i * i % 61}" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", "--workdir", str(run), "--data.path", str(text), *SIZES]) == 0
    packed = run.parent / "packed"
    assert main(["export", "--checkpoint", str(run), "--output", str(packed)]) == 0
    return run


def said(capsys, *argv):
    """What a verb says of a mistake: exit code 2, one message, no traceback."""
    capsys.readouterr()
    code = main([*map(str, argv)])
    out = capsys.readouterr()
    text = " ".join((out.err + out.out).split())
    assert code == 2, text
    assert "Traceback" not in text
    return text


def train(capsys, place, *more):
    return said(capsys, "train", "--workdir", place / "new", *SIZES, *more)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("model: {d_modle: 16}", "--model.d-model"),
        ("modle: {d_model: 16}", "--model"),
        ("model: {d_model: wide}", "wide"),
        ("model: [1, 2]", "model must be a single value. Got [1, 2]"),
        ("model: {d_model: [16]}", "model.d_model must be a single value. Got [16]"),
        ("train: {steps: 2.5}", "2.5"),
        ("arms: [dense]", "arms in"),
        ("1: 2", "keys are text: quote '1'"),
        ("arms: {64: {}, b: {}}", "keys are text: quote '64'"),
        ("arms: {on: {}}", "keys are text: quote 'on'"),
        ("- model", "must be a mapping of names to values. Got list"),
        ("", "must be a mapping of names to values. Got NoneType"),
        ("model: {d_model: 16", "is not YAML"),
        ("a: &a [*a]", "is not YAML: it has an alias"),
        ("model: !!python/object:os.system {}", "is not YAML"),
        ("model: {d_model: \x00}", "is not YAML"),
        ("model: " + "[" * 5000, "is not YAML"),
        ("seed: 2026-99-99", "is not YAML"),
        ("a: &a {x: 1}\nb: *a", "is not YAML: it has an alias"),
    ],
)
def test_preset_mistake(capsys, tmp_path, text, content, sentence):
    preset = tmp_path / "preset.yaml"
    preset.write_text(content)
    place = ["--workdir", tmp_path / "new", "--data.path", text]
    assert sentence in said(capsys, "train", preset, *place)


def test_preset_that_is_a_folder_or_not_utf8(capsys, tmp_path):
    assert "cannot be read: Is a directory" in said(capsys, "train", tmp_path)
    preset = tmp_path / "preset.yaml"
    preset.write_bytes(b"model: \xff\xfe")
    assert "is not YAML" in said(capsys, "train", preset)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--model.num-tiles 0", "num_tiles"),
        ("--model.num-tiles -4", "num_tiles"),
        ("--model.num-tiles 5", "num_tiles=5 must divide"),
        ("--model.tiles-per-cluster 3", "tiles_per_cluster=3"),
        ("--model.tiles-per-cluster 0", "tiles_per_cluster"),
        ("--model.top-k-clusters 9", "top_k_clusters=9"),
        ("--model.tiles-per-token 9", "tiles_per_token=9"),
        ("--model.n-heads 3", "n_heads=3 must divide d_model=16"),
        ("--model.n-heads 0", "n_heads"),
        ("--model.d-model 0", "d_model"),
        ("--model.n-layers 0", "n_layers"),
        ("--model.context 0", "context"),
        ("--model.dropout 1.5", "dropout"),
        ("--model.dropout nan", "dropout"),
        ("--model.vocab-size 3", "vocab_size=3 must be the tokenizer's"),
        ("--model.ffn-width 0 --model.ffn dense", "ffn_width"),
        ("--model.ffn sprase", "sparse"),
        ("--train.batch-size 0", "batch_size must be at least 1"),
        ("--train.batch-size 9 --train.accumulate 2", "accumulate=2 must divide"),
        ("--train.learning-rate 0", "learning_rate must be positive"),
        ("--train.learning-rate nan", "learning_rate must be positive"),
        ("--train.beta2 2", "beta2 must be at least 0 and below 1"),
        ("--train.schedule linear", "linear"),
        ("--train.decay-share 2", "decay_share must be in 0..1"),
        ("--init-from nowhere", "init_from must be a run directory, a step's folder"),
        ("--train.clip nan", "clip"),
        ("--train.weight-decay inf", "weight_decay"),
        ("--train.max-skipped -1", "max_skipped must not be negative"),
        ("--train.stepps 5", "--train.steps"),
        ("--train.steps", "--train.steps"),
        ("--seed -1", "seed"),
        ("--seed 99999999999999999999", "seed"),
        ("--resume maybe", "maybe"),
        ("--shard-tiles 0", "shard_tiles=0 must be at least 1 and divide the 8 dev"),
        ("--shard-tiles 3", "shard_tiles=3 must be at least 1 and divide the 8 dev"),
        ("--shard-tiles 8", "shard_tiles=8 must divide model.num_tiles=4"),
        ("--shard-tiles 2 --model.ffn dense", "needs tiles with weights"),
        ("--shard-tiles 2 --model.ffn lookup", "'hierarchical'. Got 'lookup'"),
        ("--data.val-fraction 1.5", "val_fraction must be between 0 and 1"),
        ("--data.val-fraction nan", "val_fraction must be between 0 and 1"),
        ("--data.max-bytes 0", "max_bytes must be at least 1"),
        ("--data.tokenizer bpe --data.vocab-size 5", "vocab_size must be at least 258"),
        ("--data.source parket", "parquet"),
        ("--model.context 5000", "must have at least context + 1 = 5001 tokens"),
    ],
)
def test_train_flag_mistake(capsys, tmp_path, text, flags, sentence):
    answer = train(capsys, tmp_path, "--data.path", text, *flags.split())
    assert sentence in answer


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"\x7fELF\x00\x01", "is not text: it has a NUL byte at offset 4"),
        ("caf\xe9".encode("latin-1"), "is not UTF-8 text"),
        (b"ab", "must have at least context + 1 = 17 tokens"),
        (b"a", "empty"),
        (b"to be or not to be", "must have at least context + 1 = 17 tokens"),
    ],
)
def test_corpus_mistake(capsys, tmp_path, content, sentence):
    corpus = tmp_path / "corpus.txt"
    corpus.write_bytes(content)
    assert sentence in train(capsys, tmp_path, "--data.path", corpus)


def test_corpus_that_is_not_there(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nope.txt", tmp_path / "empty"):
        assert str(path) in train(capsys, tmp_path, "--data.path", path)
        assert str(path) in said(
            capsys, "prepare", "--workdir", tmp_path / "s", "--data.path", path
        )


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"text": 1}', "line 1: must be a JSON object"),
        ("a.jsonl", b'{"txt": "a"}', "line 1: must be a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1: must be a JSON object"),
        ("a.jsonl", b"\xff\xfe", "line 1: must be a JSON object"),
        ("a.parquet", b"PAR1 not really PAR1", "is not a readable parquet file"),
    ],
)
def test_documents_mistake(capsys, tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    assert sentence in train(capsys, tmp_path, "--data.path", tmp_path / name)


def test_workdir_that_is_a_file(capsys, tmp_path, text):
    (tmp_path / "new").write_text("")
    assert str(tmp_path / "new") in train(capsys, tmp_path, "--data.path", text)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "env.json", "metrics.jsonl", "REPORT.md"]
)
def test_workdir_of_something_else_keeps_its_files(capsys, tmp_path, text, name):
    new = tmp_path / "new"
    new.mkdir()
    (new / name).write_text("mine")
    answer = train(capsys, tmp_path, "--data.path", text)
    assert f"holds {name} and is no run" in answer
    assert "Use another workdir" in answer
    assert (new / name).read_text() == "mine"
    assert {path.name for path in new.iterdir()} <= {name, ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["eval", "generate", "export"])
def test_checkpoint_mistake(capsys, tmp_path, run, verb):
    more = {"generate": ["--prompt", "1"], "export": ["--output", tmp_path / "out"]}
    more = more.get(verb, [])
    answer = said(capsys, verb, "--checkpoint", tmp_path / "nope", *more)
    assert "must be a run directory" in answer
    answer = said(capsys, verb, "--checkpoint", run, "--step", "7", *more)
    assert "has no step 7; its steps: [2]" in answer
    answer = said(capsys, verb, "--checkpoint", run, "--step", "newest", *more)
    assert "must be 'latest', 'best' or a step number" in answer


@pytest.mark.slow
def test_checkpoint_of_another_architecture(capsys, tmp_path, run):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = yaml.safe_load((other / "config.yaml").read_text())
    config["model"]["d_model"] = 32
    (other / "config.yaml").write_text(yaml.safe_dump(config))
    answer = said(capsys, "eval", "--checkpoint", other)
    assert "does not fit its config" in answer
    assert "should be (2, 16, 32). Got (2, 8, 16)" in answer


@pytest.mark.slow
def test_store_of_another_tokenizer(capsys, tmp_path, run, text):
    store = tmp_path / "store"
    argv = ["prepare", "--workdir", store, "--data.path", text]
    assert main([*map(str, argv), "--data.tokenizer", "byte"]) == 0
    answer = said(capsys, "eval", "--checkpoint", run, "--data", store)
    assert "was made with another tokenizer" in answer
    flags = ("--data.tokenizer", "byte", "--data.path", store)
    assert "vocab" in train(capsys, tmp_path, *flags, "--model.vocab-size", 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--prompt", ""], "prompt must have at least one token"),
        (["--prompt", "#"], "must use the"),
        (["--prompt", "1", "--tokens", "-1"], "new_tokens must not be negative"),
        (["--prompt", "1", "--temperature", "nan"], "temperature must be finite"),
        (["--prompt", "1", "--temperature", "-1"], "temperature must be finite"),
        (["--prompt", "1", "--top-p", "0"], "top_p must be above 0"),
        (["--prompt", "1", "--seed", "4294967296"], "seed must be in 0..2**32 - 1"),
        (["--prompt", "1", "--top-k", "-2"], "top_k must not be negative"),
        (["--prompt", "1", "--tokens", "many"], "tokens"),
    ],
)
def test_generate_mistake(capsys, run, flags, sentence):
    assert sentence in said(capsys, "generate", "--checkpoint", run, *flags)


@pytest.mark.slow
def test_generate_past_the_context_goes_on(capsys, run):
    argv = ["generate", "--checkpoint", run, "--prompt", "1 is " * 9, "--tokens", 40]
    assert main([*map(str, argv), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["text"]) == 85


@pytest.mark.slow
def test_eval_batch_size_mistake(capsys, run):
    answer = said(capsys, "eval", "--checkpoint", run, "--batch-size", "0")
    assert "batch_size and context must be at least 1" in answer


@pytest.mark.slow
def test_export_mistake(capsys, tmp_path, run):
    packed = tmp_path / "packed"
    shutil.copytree(run.parent / "packed", packed)
    weights = packed / "model.safetensors"
    sound = weights.read_bytes()
    header = int.from_bytes(sound[:8], "little")
    hostile = {
        "empty": b"",
        "cut": sound[: len(sound) // 2],
        "header of 16 exabytes": b"\xff" * 8 + sound[8:],
        "header that is no JSON": sound[:8] + b"{" * header + sound[8 + header :],
        "deep header": (10**5).to_bytes(8, "little") + b"[" * 10**5,
    }
    for name, data in hostile.items():
        weights.write_bytes(data)
        answer = said(capsys, "eval", "--checkpoint", packed, "--data", run / "data")
        assert "model.safetensors cannot be used" in answer, name
    weights.write_bytes(sound)
    for content in (b"", b"{}", b"[]", b'{"model": 3}', b"[" * 10**5, b"\xff"):
        (packed / "config.json").write_bytes(content)
        answer = said(capsys, "eval", "--checkpoint", packed, "--data", run / "data")
        assert "config.json is not the config of an exported model" in answer


@pytest.mark.slow
def test_tokens_outside_the_vocabulary(capsys, tmp_path, run):
    """A store whose manifest was made for what it holds, which the model cannot know."""
    from trix_jax.lm.data import store

    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(run / "tokenizer.json", odd)
    splits = {}
    for name in ("train", "val"):
        with store.SplitWriter(odd, name, 60_000) as split:
            split.append(np.arange(100) * 500, num_bytes=100)
        splits[name] = split
    store.write_manifest(odd, {}, "by hand", splits)
    answer = said(capsys, "eval", "--checkpoint", run, "--data", odd)
    assert "must hold tokens of its tokenizer, below 14. Got 49500" in answer
    flags = ("--data.tokenizer", "byte", "--data.path", odd)
    assert "below 14. Got 49500" in train(capsys, tmp_path, *flags)
