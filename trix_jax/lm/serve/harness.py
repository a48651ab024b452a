"""Runs and exports in EleutherAI's lm-evaluation-harness; the `harness` extra.

    from trix_jax.lm.serve.harness import run
    run("runs/a", ["my_task"], include_path="folder/of/task/files")

A string's probability is that of its tokens, each given at most a context of those
before it, cut from the left. Context and continuation are encoded together and parted
by the harness' own rule, and whole texts are read in its own windows, which count every
token once. What starts a text is conditioned on the tokenizer's end-of-text mark; a
tokenizer without one has nothing to condition the first token on, which then is not
scored.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trix_jax.lm.serve.generate import SamplingConfig, generate
from trix_jax.lm.serve.load import load_run
from trix_jax.nn.transformer import TransformerLM

NEW_TOKENS = 256  # the harness' own default for tasks that do not say
SEED = SamplingConfig.seed  # of a request that comes once


class TrixLM(TemplateLM):
    """A run or an export as the harness sees it."""

    def __init__(self, checkpoint: str | Path, step: str = "latest", batch: int = 16):
        super().__init__()
        model, self._variables, self._tokenizer = load_run(checkpoint, step)
        self._model = TransformerLM(model.config.as_served())
        if self._tokenizer.kind == "none":
            raise ValueError(
                f"{checkpoint} has no tokenizer, and the tasks of the harness are text: "
                "prepare its tokens with --data.tokenizer, and train on these."
            )
        self._context, self._batch = self._model.config.context, batch
        self._score = jax.jit(self._score_batch)

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eot

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """Ids of a text, behind the end-of-text mark if there is one."""
        return self._start() + self._ids(string)

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        """Log-probability of a continuation, and whether greedy decoding gives it.

        Raises:
            ValueError: a continuation that is empty, or longer than the model's
                context.
        """
        pairs = [self._pair(*request.args) for request in requests]
        return self._loglikelihood_tokens(pairs)

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False):
        """The same of (context ids, continuation ids)."""
        return self._scores([self._fitted(*pair) for pair in requests])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        """Log-probability of whole texts, window after window of the context."""
        totals = []
        for request in requests:
            prefix, *ids = self.tok_encode(request.args[0]) or [0]
            windows = get_rolling_token_windows(ids, prefix, self._context, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            scored = self._loglikelihood_tokens(pairs)
            totals.append(sum(value for value, _ in scored))
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Continues texts until the end-of-text mark, or one of the strings that end
        them; neither is part of the answer. A request that comes again (`repeats`) is
        sampled with the next seed.
        """
        times, answers = Counter(), []
        for request in requests:
            context, options = request.args
            asked = context, repr(options)
            answers.append(self._continue(context, options, SEED + times[asked]))
            times[asked] += 1
        return answers

    def _continue(self, context: str, options: dict[str, Any], seed: int) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        count = options.get("max_gen_toks") or NEW_TOKENS
        ids = self.tok_encode(context)
        if count < self._context:  # room for what is asked for, as others leave it
            ids = ids[count - self._context :]
        prompt = np.asarray(ids, np.int32)
        new: list[int] = []
        text = ""
        sampling, end = _sampling(options, seed), self._tokenizer.eot
        how = self._model, self._variables, prompt, count, sampling, end
        for token in generate(*how):
            if token == end:
                break
            new.append(token)
            text = self._tokenizer.decode(new)
            ends = [text.find(mark) for mark in until if mark and mark in text]
            if ends:
                return text[: min(ends)]
        return text

    def _ids(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)]

    def _start(self) -> list[int]:
        return [] if self._tokenizer.eot is None else [self._tokenizer.eot]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of a context and of what follows it; white space that ends the context
        belongs to what follows, where a token may hold both.
        """
        if context:
            return self._encode_pair(context, continuation)
        return self._start(), self._ids(continuation)

    def _fitted(self, before: list[int], after: list[int]) -> tuple[list[int], int]:
        """Ids that the model can read, and the first that is scored, at least the
        second of them.
        """
        if not after or len(after) > self._context:
            raise ValueError(
                f"a continuation must have 1 to {self._context} tokens. Got {len(after)}."
            )
        ids = [*before, *after][-self._context - 1 :]
        return ids, max(1, len(ids) - len(after))

    def _scores(self, pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        found = []
        for at in range(0, len(pairs), self._batch):
            group = pairs[at : at + self._batch]
            tokens = np.zeros((self._batch, self._context + 1), np.int32)
            spans = np.zeros((self._batch, 2), np.int32)
            for row, (ids, first) in enumerate(group):
                tokens[row, : len(ids)] = ids
                spans[row] = first, len(ids)
            sums, greedy = self._score(self._variables, tokens, spans)
            rows = zip(sums.tolist(), greedy.tolist(), strict=True)
            found += list(rows)[: len(group)]
        return found

    def _score_batch(self, variables, tokens, spans):
        """Sum of `log p(tokens[i])` over `first <= i < end`, and whether all were the
        likeliest.
        """
        outputs: Any = self._model.apply(variables, tokens[:, :-1])
        log_p = jax.nn.log_softmax(outputs[0])
        target = tokens[:, 1:, None]
        own = jnp.take_along_axis(log_p, target, axis=-1)[..., 0]
        place = jnp.arange(1, tokens.shape[1])[None]
        counted = (place >= spans[:, :1]) & (place < spans[:, 1:])
        likeliest = log_p.argmax(axis=-1) == target[..., 0]
        return jnp.where(counted, own, 0).sum(axis=1), (likeliest | ~counted).all(
            axis=1
        )


def _sampling(options: dict[str, Any], seed: int) -> SamplingConfig:
    """A task's own options; greedy unless it asks for a temperature."""
    greedy = options.get("do_sample") is False
    temperature = 0.0 if greedy else float(options.get("temperature") or 0.0)
    top_k, top_p = options.get("top_k") or 0, options.get("top_p") or 1.0
    return SamplingConfig(temperature, int(top_k), float(top_p), seed)


def run(
    checkpoint: str | Path,
    tasks: list[str],
    *,
    include_path: str | Path | None = None,
    step: str = "latest",
    limit: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates a run or an export on tasks; the harness' results, a dict a task.

    Args:
        tasks: names, of the harness' own or from `include_path`.
        include_path: a folder of task files.
        limit: examples a task.
    """
    done = lm_eval.simple_evaluate(
        TrixLM(checkpoint, step),
        tasks=list(tasks),
        task_manager=TaskManager(include_path=include_path and str(include_path)),
        limit=limit,
        bootstrap_iters=0,
    )
    return done["results"]
