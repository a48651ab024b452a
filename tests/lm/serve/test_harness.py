"""The adapter for lm-evaluation-harness, on a task from a local file."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train.loop import train

pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

TASK = """
task: tile
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
DOCS = [
    {
        "text": "the tile that matches a token best is the ",
        "choices": ["tile", "9999"],
        "label": 0,
    },
    {"text": "it is the tile that ", "choices": ["77777", "match"], "label": 1},
]


def own_score(model, variables, ids, first):
    """Sum of log-probabilities by one plain call."""
    logits = model.apply(variables, jnp.asarray(ids[:-1])[None])[0][0]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    return sum(log_p[i - 1, ids[i]] for i in range(first, len(ids)))


def test_scores_are_those_of_a_plain_call(run_dir):
    from lm_eval.api.instance import Instance

    from trix_jax.lm.serve.harness import TrixLM

    adapter = TrixLM(run_dir, batch=2)
    model, variables, tokenizer = load_run(run_dir)
    asked = [
        ("the tile ", "that"),
        ("a token best is the tile that ", "it"),
        ("th", "e"),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in asked]
    found = adapter.loglikelihood(requests)
    for (context, continuation), (value, _) in zip(asked, found, strict=True):
        ids = tokenizer.encode(context + continuation)[-17:]
        spaces = len(context) - len(context.rstrip())  # belong to what follows
        want = own_score(model, variables, ids, len(ids) - len(continuation) - spaces)
        assert value == pytest.approx(want, rel=1e-4)
    text = "the tile that matches a token best is"
    (whole,) = adapter.loglikelihood_rolling([Instance("x", {}, (text,), 0)])
    ids = tokenizer.encode(text)
    # Every token but the first once; the last window reaches back as far as it can.
    last = (len(ids) - 1) % 16 or 16
    parts = [(ids[at : at + 17], 1) for at in range(0, len(ids) - last - 1, 16)]
    parts.append((ids[-17:], 17 - last))
    assert sum(len(part) - first for part, first in parts) == len(ids) - 1
    want = sum(own_score(model, variables, *part) for part in parts)
    assert whole == pytest.approx(want, rel=1e-4)
    options = {"until": [" "], "max_gen_toks": 8}
    (word,) = adapter.generate_until([Instance("x", {}, ("the ti", options), 0)])
    assert " " not in word
    with pytest.raises(ValueError, match="1 to 16 tokens"):
        adapter.loglikelihood([Instance("x", {}, ("a", "t" * 17), 0)])


def test_task_from_a_local_file(run_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    from trix_jax.lm.serve.harness import run

    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, DOCS)))
    (tmp_path / "tile.yaml").write_text(TASK.format(file=tmp_path / "docs.jsonl"))
    results = run(run_dir, ["tile"], include_path=tmp_path)
    model, variables, tokenizer = load_run(run_dir)
    right = 0
    for doc in DOCS:
        ids = [
            tokenizer.encode(doc["text"] + choice)[-17:] for choice in doc["choices"]
        ]
        scores = [
            own_score(model, variables, line, len(line) - len(choice))
            for line, choice in zip(ids, doc["choices"], strict=True)
        ]
        right += int(np.argmax(scores)) == doc["label"]
    assert results["tile"]["acc,none"] == pytest.approx(right / 2)


@pytest.fixture(scope="module", params=["char", "byte", "bpe"])
def adapter(request, tiny_config, one_device, tmp_path_factory):
    """A run on documents, which end in the tokenizer's mark."""
    from trix_jax.lm.serve.harness import TrixLM

    folder = tmp_path_factory.mktemp(request.param)
    rows = [{"text": f"the tile {i} that matches. " * 3} for i in range(60)]
    (folder / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dataclasses.replace(
        tiny_config.data,
        source="jsonl",
        path=str(folder / "docs.jsonl"),
        tokenizer=request.param,
        vocab_size=300,
        val_fraction=0.2,
    )
    config = dataclasses.replace(tiny_config, data=data)
    train(config, folder / "run", devices=one_device, report=lambda _: None)
    return TrixLM(folder / "run")


def test_context_and_continuation_are_encoded_together(adapter):
    for context, continuation in (("the tile ", "12"), ("the tile", " 12"), ("", "th")):
        before, after = adapter._pair(context, continuation)
        assert before + after == adapter.tok_encode(context + continuation)
    split = (
        adapter._pair(*pair) for pair in (("the tile ", "12"), ("the tile", " 12"))
    )
    one, other = adapter._scores([adapter._fitted(*pair) for pair in split])
    assert one == other  # where the space stands does not matter


@pytest.mark.parametrize(
    ("until", "answer"), [([], "that 7."), (["7"], "that "), ("t 7", "tha")]
)
def test_answer_ends_at_the_end_of_text_and_at_every_given_string(
    adapter, monkeypatch, until, answer
):
    from lm_eval.api.instance import Instance

    from trix_jax.lm.serve import harness

    said = [*adapter._ids("that 7."), adapter.eot_token_id, *adapter._ids("the tile")]
    monkeypatch.setattr(harness, "generate", lambda *_: iter(said))
    request = Instance("x", {}, ("the tile ", {"until": until}), 0)
    assert adapter.generate_until([request]) == [answer]


def test_a_request_that_comes_again_is_sampled_with_the_next_seed(adapter, monkeypatch):
    from lm_eval.api.instance import Instance

    from trix_jax.lm.serve import harness

    seeds = []
    monkeypatch.setattr(
        harness, "generate", lambda *a: iter(seeds.append(a[4].seed) or [])
    )
    options = {"do_sample": True, "temperature": 1.0}
    asked = [Instance("x", {}, (text, options), 0) for text in ("the", "tile", "the")]
    adapter.generate_until(asked)
    assert seeds == [42, 42, 43]


def test_long_context_is_cut_from_the_left_with_room_for_the_answer(
    adapter, monkeypatch
):
    from lm_eval.api.instance import Instance

    from trix_jax.lm.serve import harness

    seen = []
    monkeypatch.setattr(harness, "generate", lambda *a: iter(seen.append(a[2]) or []))
    text = "the tile 1 that matches. " * 4
    request = Instance("x", {}, (text, {"max_gen_toks": 6}), 0)
    adapter.generate_until([request])
    assert seen[0].tolist() == adapter.tok_encode(text)[6 - 16 :]
