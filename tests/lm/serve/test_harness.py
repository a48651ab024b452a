"""The adapter for lm-evaluation-harness, on a task from a local file."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax.lm.serve.load import load_run

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
        want = own_score(model, variables, ids, len(ids) - len(continuation))
        assert value == pytest.approx(want, rel=1e-4)
    text = "the tile that matches a token best is"
    (whole,) = adapter.loglikelihood_rolling([Instance("x", {}, (text,), 0)])
    ids = tokenizer.encode(text)
    parts = [ids[at : at + 17] for at in range(0, len(ids) - 1, 16)]
    want = sum(own_score(model, variables, part, 1) for part in parts)
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
