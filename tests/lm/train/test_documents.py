"""Documents kept apart in training, evaluation, export and generation alike; and what
accumulation does to the balance loss.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trix_jax.lm.config import RunConfig, resolve
from trix_jax.lm.data import open_store
from trix_jax.lm.data.pipeline import eval_batches
from trix_jax.lm.serve.export import export, load
from trix_jax.lm.serve.generate import SamplingConfig, generate
from trix_jax.lm.serve.load import load_run
from trix_jax.lm.train.evaluate import evaluate
from trix_jax.lm.train.loop import train
from trix_jax.lm.train.optimizer import make_optimizer
from trix_jax.lm.train.step import init_state, make_train_step
from trix_jax.nn.transformer import TransformerLM


def with_model(config, **values):
    model = dataclasses.replace(config.model, **values)
    return dataclasses.replace(config, model=model)


@pytest.fixture(scope="module")
def run(tiny_config, one_device, tmp_path_factory):
    """A run over many short documents."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), 5)) for _ in range(400)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    (folder / "text.jsonl").write_text(lines)
    path = str(folder / "text.jsonl")
    data = dataclasses.replace(tiny_config.data, source="jsonl", path=path)
    config = dataclasses.replace(with_model(tiny_config, document_mask=True), data=data)
    train(config, folder / "run", devices=one_device, report=lambda _: None)
    return folder / "run"


def by_documents(model, variables, store):
    """The validation loss of windows whose documents are read each in a call."""
    alone = TransformerLM(dataclasses.replace(model.config, document_mask=False))
    read = jax.jit(lambda tokens: alone.apply(variables, tokens)[0])
    total, count = 0.0, 0
    for batch, mask in eval_batches(store.val, batch_size=4, context=16):
        for row, real in zip(batch, mask, strict=True):
            inputs, targets = row[:-1], row[1:]
            marks = np.flatnonzero(inputs == store.tokenizer.eot)
            parts = np.split(np.arange(16), marks)
            logits = np.concatenate([read(inputs[None, p])[0] for p in parts if p.size])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            total, count = total + float((loss * real).sum()), count + real.sum()
    return total / count


@pytest.mark.slow
def test_evaluation_and_export_read_every_document_alone(run, tmp_path):
    model, variables, _ = load_run(run)
    store = open_store(run / "data")
    assert model.config.end_token == store.tokenizer.eot == 4
    loss = evaluate(model, variables, store).val_loss
    assert loss == pytest.approx(by_documents(model, variables, store), abs=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["final_val_loss"] == pytest.approx(loss, abs=1e-6)
    export(model, variables, store.tokenizer, tmp_path / "out")
    packed_model, packed, *_ = load(tmp_path / "out")
    assert packed_model.config == model.config
    assert evaluate(packed_model, packed, store).val_loss == pytest.approx(loss, 1e-5)


@pytest.mark.slow
def test_generation_reads_a_document_as_training_does(run):
    model, variables, _ = load_run(run)
    prompt = [0, 1, 2, 4, 3]  # the end mark opens the second document
    greedy = SamplingConfig(temperature=0.0)
    new = list(generate(model, variables, np.asarray(prompt), 4, greedy))
    for i in range(4):
        line = jnp.asarray([[4, 3, *new[:i]]])
        assert int(model.apply(variables, line)[0][0, -1].argmax()) == new[i]


def test_documents_need_a_mark_and_its_number_is_the_tokenizers(tiny_config):
    config = with_model(tiny_config, document_mask=True)
    with pytest.raises(ValueError, match="needs a tokenizer with an end mark"):
        resolve(config, 5)
    assert resolve(config, 5, end_token=4).model.end_token == 4
    assert resolve(tiny_config, 5, end_token=4).model.end_token is None
    with pytest.raises(ValueError, match="end_token=3 must be the tokenizer's 4"):
        resolve(with_model(config, end_token=3), 5, end_token=4)


@pytest.mark.slow
def test_accumulated_balance_loss_is_the_mean_of_those_of_the_micro_batches(
    tiny_config,
):
    config: RunConfig = resolve(tiny_config, 7)
    model, optimizer = TransformerLM(config.model), make_optimizer(config.train)
    state = init_state(model, optimizer, 0)
    step = make_train_step(model, optimizer, config.train)
    balance = jax.jit(lambda s, batch: step(s, batch)[1].aux_balance)
    batch = np.random.default_rng(0).integers(0, 7, (2, 4, 17))
    parts = [balance(state, part[None]) for part in batch]
    whole = balance(state, batch.reshape(1, 8, 17))
    np.testing.assert_allclose(balance(state, batch), np.mean(parts), rtol=1e-5)
    # Routes are the same; a micro-batch's load is more uneven than that of the whole.
    assert np.mean(parts) > whole
