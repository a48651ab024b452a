"""Decoding on the device: the tokens of a plain loop, many sequences at once, ends."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trix_jax import TransformerConfig, TransformerLM, freeze
from trix_jax.cli import generate as verb
from trix_jax.cli.main import main
from trix_jax.lm.data.tokenizer import IdTokenizer
from trix_jax.lm.serve import decode
from trix_jax.lm.serve.generate import (
    SamplingConfig,
    generate,
    generate_batch,
    sample,
)

GREEDY = SamplingConfig(temperature=0.0)
DRAWN = SamplingConfig(temperature=1.0, top_k=20, top_p=0.95, seed=7)
CONTEXT = 24
SHAPE = TransformerConfig(
    vocab_size=40,
    context=CONTEXT,
    d_model=32,
    n_layers=1,
    n_heads=2,
    ffn="sparse",
    num_tiles=4,
    tiles_per_token=2,
    router_input="pair",
)
PROMPTS = [np.random.default_rng(n).integers(0, 40, n) for n in (3, 11, 1, 7)]


@pytest.fixture(scope="module")
def model():
    return TransformerLM(SHAPE)


@pytest.fixture(scope="module")
def variables(model):
    return drawn(model)


def drawn(model):
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(model.init)(jax.random.key(0), tokens)


def by_hand(model, variables, prompt, count, config):
    """One whole call a token, on the window that `generate` says it sees."""
    context, key = model.config.context, jax.random.key(config.seed)

    @jax.jit
    def drawn_after(tokens, at, i):
        logits = model.apply(variables, tokens)[0][:, at]
        return sample(logits, jax.random.fold_in(key, i), config)[0]

    text = list(map(int, prompt))
    window = text[-context:]
    for i in range(count):
        if len(window) > context:
            window = text[-max(1, context // 2) :]
        # What stands behind a token changes nothing for it.
        tokens = np.zeros((1, context), np.int32)
        tokens[0, : len(window)] = window
        token = int(drawn_after(tokens, len(window) - 1, i))
        text, window = [*text, token], [*window, token]
    return text[len(prompt) :]


@pytest.mark.slow
@pytest.mark.parametrize("config", [GREEDY, DRAWN])
def test_tokens_are_those_of_whole_calls_past_the_context_too(model, variables, config):
    count = 2 * CONTEXT + 3
    found = list(generate(model, variables, PROMPTS[1], count, config))
    assert found == by_hand(model, variables, PROMPTS[1], count, config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "lengths"),
    [
        ({"ffn": "dense", "document_mask": True, "end_token": 3}, (1, 16, CONTEXT, 40)),
        ({"ffn": "lookup", "tiles_per_token": 1, "tiles_per_cluster": 2}, (1, CONTEXT)),
        (
            {"ffn": "lookup", "tiles_per_cluster": 4, "grid_size": 2, "reads": "own"},
            (16, 40),
        ),
        (
            {"ffn": "hierarchical", "tiles_per_cluster": 4, "positions": "rotary"},
            (1, 40),
        ),
        (
            {"router_input": "hidden", "positions": "rotary", "qk_norm": True},
            (16, CONTEXT),
        ),
        ({"context": 1}, (1, 40)),
    ],
)
def test_tokens_of_every_kind_of_model_are_those_of_whole_calls(changes, lengths):
    model = TransformerLM(dataclasses.replace(SHAPE, **changes))
    variables = drawn(model)
    kinds = [variables]
    if model.config.ffn != "dense":
        kinds.append(freeze(model, variables, jnp.zeros((1, 1), jnp.int32)))
    for length in lengths:
        prompt = np.random.default_rng(length).integers(0, 40, length)
        wanted = by_hand(model, variables, prompt, 30, DRAWN)
        for kind in kinds:
            assert list(generate(model, kind, prompt, 30, DRAWN)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("config", [GREEDY, DRAWN])
def test_sequences_together_are_those_alone_of_their_seeds(model, variables, config):
    room = CONTEXT - 11  # until the longest fills the context
    together = generate_batch(model, variables, PROMPTS, room + 1, config)
    for row, (prompt, found) in enumerate(zip(PROMPTS, together, strict=True)):
        own = dataclasses.replace(config, seed=config.seed + row)
        assert found == list(generate(model, variables, prompt, room + 1, own))


@pytest.mark.slow
def test_sequences_of_one_length_are_those_alone_past_the_context_too(model, variables):
    prompts, count = [np.roll(PROMPTS[1], by) for by in range(4)], 2 * CONTEXT
    together = generate_batch(model, variables, prompts, count, DRAWN)
    for row, (prompt, found) in enumerate(zip(prompts, together, strict=True)):
        own = dataclasses.replace(DRAWN, seed=DRAWN.seed + row)
        assert found == list(generate(model, variables, prompt, count, own))


def cut_at(tokens, end):
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


@pytest.mark.slow
def test_a_sequence_stops_after_its_end_mark_and_the_others_go_on(model, variables):
    count = 2 * CONTEXT
    free = generate_batch(model, variables, PROMPTS, count, DRAWN)
    end = free[1][4]  # what one of them says in the middle of a loop
    wanted = [cut_at(tokens, end) for tokens in free]
    assert len({len(tokens) for tokens in wanted}) > 1
    assert generate_batch(model, variables, PROMPTS, count, DRAWN, end) == wanted
    alone = list(generate(model, variables, PROMPTS[0], count, DRAWN))
    found = list(generate(model, variables, PROMPTS[0], count, DRAWN, alone[0]))
    assert found == alone[:1]


@pytest.mark.slow
def test_a_loop_is_one_call_that_ends_with_the_last_sequence(model, variables):
    steps = decode.compiled(SHAPE, dataclasses.replace(DRAWN, seed=0))
    (free,) = generate_batch(model, variables, PROMPTS[:1], 8, DRAWN)
    texts, end = [PROMPTS[0].tolist()], free[5]
    tokens, mask, length = decode.lined_up(texts, CONTEXT, CONTEXT)
    draws = decode.begin(DRAWN.seed, 1, end)
    before, first = steps.read(variables, tokens, mask, np.int32(length), draws)
    after, rest = steps.write(variables, before, np.int32(15))
    wanted = cut_at(free, end)
    assert first.tolist() == [wanted[:1]]
    padded = wanted[1:] + [decode.NOTHING] * (CONTEXT - len(wanted) + 1)
    assert rest.tolist() == [padded]
    assert int(after.draws.number) == len(wanted)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.cache))


def test_prompts_stand_side_by_side_at_their_ends():
    tokens, mask, length = decode.lined_up([[1, 2, 3], [4], [5] * 30], 20, 24)
    assert (tokens.shape, length) == ((3, 24), 20)
    assert tokens[0].tolist() == [0] * 17 + [1, 2, 3] + [0] * 4
    assert mask[1].tolist() == [False] * 19 + [True] + [False] * 4
    assert mask.sum(axis=1).tolist() == [3, 1, 20]


def test_prompts_of_all_lengths_share_a_few_shapes():
    widths = {decode.lined_up([[0] * n], 300, 300)[0].shape for n in range(1, 301)}
    assert widths == {(1, width) for width in (16, 32, 64, 128, 256, 300)}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "at least one prompt"), ([[1], []], r"prompts\[1\] must"), ([[40]], "0..39")],
)
def test_prompts_that_are_none_are_refused(model, variables, prompts, message):
    given = [np.asarray(prompt, np.int32) for prompt in prompts]
    with pytest.raises(ValueError, match=message):
        generate_batch(model, variables, given, 4)


def said(capsys, *flags):
    """Exit code and ids of `generate` after a prompt of three."""
    flags = ("--checkpoint", "run", "--prompt-ids", "3", "1", "2", *flags)
    flags += ("--tokens", "20", "--temperature", "1.0", "--seed", "7", "--json")
    code, shown = main(["generate", *flags]), capsys.readouterr()
    return code, json.loads(shown.out.splitlines()[-1])["ids"] if not code else shown


@pytest.mark.slow
def test_generate_until_end_shows_what_stands_before_the_mark(
    model, variables, capsys, monkeypatch
):
    def with_end(mark):
        loaded = model, variables, IdTokenizer(40, mark)
        monkeypatch.setattr(verb, "load_run", lambda *_: loaded)

    with_end(None)
    _, free = said(capsys)
    assert len(free) == 3 + 20
    code, shown = said(capsys, "--until-end")
    assert code == 2
    assert "until_end needs an end-of-text mark" in shown.err
    with_end(free[9])
    assert said(capsys) == (0, free)
    assert said(capsys, "--until-end") == (0, free[: free.index(free[9], 3)])


@pytest.mark.parametrize(
    "prompt", [np.array([1.7]), np.array([True]), np.array([[1, 2, 3]])]
)
def test_prompts_that_are_no_ids_are_refused(model, variables, prompt, no_type_hook):
    with pytest.raises(ValueError, match=r"prompt must be integer ids, \[length\]"):
        generate(model, variables, prompt, 3, GREEDY)
    with pytest.raises(ValueError, match=r"prompts\[0\] must be integer ids"):
        generate_batch(model, variables, [prompt], 3, GREEDY)
