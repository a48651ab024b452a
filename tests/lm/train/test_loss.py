"""Cross-entropy in parts: the loss and the gradients of the whole, without its memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trix_jax import TransformerConfig, TransformerLM
from trix_jax.lm.train import loss
from trix_jax.lm.train.eval_step import make_eval_step

B, L, D, V = 3, 4, 8, 10
SIZES: dict[str, Any] = {"d_model": D, "n_layers": 1, "n_heads": 2, "ffn": "dense"}


def plain(x, head, labels):
    logits = (x @ head.astype(x.dtype).T).astype(jnp.promote_types(x.dtype, "float32"))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def inputs(dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (B, L, D), dtype)
    return x, jax.random.normal(keys[1], (V, D)), jnp.arange(B * L).reshape(B, L) % V


def error(found, exact):
    found, exact = (np.asarray(a, np.float64) for a in (found, exact))
    return np.abs(found - exact).max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("left_out", [1, 0])  # with one, the last part is not full
def test_parts_are_as_near_to_float64_as_the_whole(dtype, left_out, monkeypatch):
    x, head, labels = inputs(dtype)
    x, labels = x[:, left_out:], labels[:, left_out:]
    weights = jax.random.normal(jax.random.key(2), labels.shape)

    def gradients(of, *args):
        def total(x, head):
            losses = of(x, head, labels)
            return (losses * weights).sum(), losses

        (_, losses), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(*args)
        return losses, *grads

    with jax.enable_x64(True):
        exact = gradients(plain, *(a.astype("float64") for a in (x, head)))
    whole = gradients(plain, x, head)
    monkeypatch.setattr(loss, "LOGITS", 45 if left_out else 25)
    count, size = loss.parts_of(labels.size, V)
    assert count > 1
    assert bool(count * size - labels.size) is bool(left_out)
    parts = gradients(loss.cross_entropy, x, head)
    for part, one, real in zip(parts, whole, exact, strict=True):
        assert part.dtype == one.dtype
        assert error(part, real) <= 1.5 * error(one, real) + 1e-7


def test_parts_are_the_fewest_that_fit():
    assert loss.parts_of(16384, 32768) == (8, 2048)
    assert loss.parts_of(12 * 64, 65) == (1, 12 * 64)
    assert loss.parts_of(loss.LOGITS // 1000, 1000)[0] == 1
    assert loss.parts_of(35, loss.LOGITS // 10) == (4, 9)  # the last has eight
    assert loss.parts_of(3 * 8191, 50257) == (19, 1294)
    assert loss.parts_of(7, 2 * loss.LOGITS) == (7, 1)  # a token is the least
    assert loss.parts_of(1, 2 * loss.LOGITS) == (1, 1)


def test_parts_hold_a_part_of_the_logits(monkeypatch):
    """16,384 tokens and 32,768 ids: 2 GiB of float32 logits."""
    x = jax.ShapeDtypeStruct((16, 1024, 8), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((32768, 8), jnp.float32)
    labels = jax.ShapeDtypeStruct((16, 1024), jnp.int32)

    def temporary_bytes():
        def mean(x, head, labels):
            return loss.cross_entropy(x, head, labels).mean()

        compiled = jax.jit(jax.grad(mean, (0, 1))).lower(x, head, labels).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes() < 0.8 * 2**30
    monkeypatch.setattr(loss, "LOGITS", 2**40)
    assert temporary_bytes() > 2 * 2**30


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_head_are_the_models_logits(tied):
    config = TransformerConfig(vocab_size=V, context=L, tied=tied, **SIZES)
    model = TransformerLM(config)
    tokens = np.arange(B * L).reshape(B, L) % V
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    apply = functools.partial(model.apply, variables, tokens)
    hidden, logits = apply(hidden=True)[0], apply()[0]
    head = loss.head_weights(variables["params"], model.config)
    np.testing.assert_array_equal(hidden @ head.T, logits)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_an_evaluation_in_parts_sums_the_losses_of_all_logits(tied, monkeypatch):
    config = TransformerConfig(vocab_size=V, context=L, tied=tied, **SIZES)
    model = TransformerLM(config)
    tokens = jnp.arange(B * (L + 1)).reshape(B, L + 1) % V
    mask = np.ones((B, L), np.float32)
    mask[-1, 1:] = 0
    variables = jax.jit(model.init)(jax.random.key(0), tokens[:, 1:])
    logits = jax.jit(model.apply)(variables, tokens[:, :-1])[0]
    with jax.enable_x64(True):
        exact = plain(jnp.asarray(logits, "float64"), jnp.eye(V), tokens[:, 1:])
        exact = float((exact * mask).sum())
    found = []
    for limit in (2**26, 25):
        monkeypatch.setattr(loss, "LOGITS", limit)
        sums = make_eval_step(model)(variables, tokens, mask, 1.0)
        assert float(sums.tokens) == mask.sum()
        found.append(float(sums.loss))
    np.testing.assert_allclose(found, exact, rtol=1e-6)  # sums of nine in float32


def test_an_evaluation_holds_a_part_of_the_logits(monkeypatch):
    """16,384 tokens and 32,768 ids: 2 GiB of float32 logits."""
    config = TransformerConfig(vocab_size=32768, context=16, **SIZES)
    model, tokens = TransformerLM(config), jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    rows = jax.ShapeDtypeStruct((1024, 17), jnp.int32)
    mask, done = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1024, 16), ()))

    def temporary_bytes():
        step = jax.jit(make_eval_step(model))
        compiled = step.lower(shapes, rows, mask, done).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes() < 0.8 * 2**30
    monkeypatch.setattr(loss, "LOGITS", 2**40)
    assert temporary_bytes() > 2 * 2**30


@pytest.mark.parametrize("dtype", ["int32", "uint8"])
def test_a_label_that_is_no_id_gives_nan_and_the_others_their_loss(dtype):
    rng = np.random.default_rng(0)
    x, head = jnp.float32(rng.normal(size=(1, 3, 4))), jnp.eye(5, 4)
    found = loss.cross_entropy(x, head, jnp.asarray([[0, 4, 5]], dtype))
    logits = np.float64(x @ head.T)[0]
    expected = np.log(np.exp(logits).sum(-1))[:2] - logits[[0, 1], [0, 4]]
    np.testing.assert_allclose(found[0, :2], expected, rtol=1e-5)
    assert np.isnan(found[0, 2])
    if dtype == "int32":
        assert np.isnan(loss.cross_entropy(x, head, jnp.full((1, 3), -1))).all()
