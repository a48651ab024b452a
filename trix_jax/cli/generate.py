"""`trix-jax generate --checkpoint DIR --prompt TEXT`."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np
import tyro

from trix_jax import ops, widen
from trix_jax.cli.common import print_json
from trix_jax.lm.data import Tokenizer
from trix_jax.lm.presets import parse
from trix_jax.lm.serve.generate import SamplingConfig, generate
from trix_jax.lm.serve.load import load_run
from trix_jax.nn.transformer import TransformerLM
from trix_jax.typing import Variables


@dataclasses.dataclass(frozen=True)
class Args:
    """Restore a run or an export and sample from it."""

    checkpoint: str
    """The run directory, or an export."""
    prompt: str | None = None
    """The text to go on from."""
    prompt_ids: tuple[int, ...] = ()
    """Ids to go on from, in place of a text."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SamplingConfig
    )
    tokens: int = 300
    """How many tokens to add."""
    until_end: bool = False
    """Stop at the tokenizer's end-of-text mark, which is not shown."""
    step: str = "latest"
    """Of a run: latest (the newest good one), best, or a number."""
    wide: bool = False
    """Of an export: keep a ternary weight in a byte, not in two bits. The same tokens,
    on a CPU faster, in four times the memory of the tiles."""
    json: bool = False
    """End standard output with the text as one line of JSON."""


def main(argv: list[str]) -> None:
    """Prints the prompt and what follows it, as it comes."""
    args = parse(Args, argv, "generate")
    _check(args)
    model, variables, tokenizer = load_run(args.checkpoint, args.step)
    if args.wide:
        variables = _widened(args, variables)
    given = args.prompt_ids if args.prompt is None else tokenizer.encode(args.prompt)
    prompt = np.asarray(given, np.int64)
    ids, shown = [*map(int, prompt)], ""
    end = _end(args, tokenizer)
    model = TransformerLM(model.config.as_served())
    tokens = generate(model, variables, prompt, args.tokens, args.sampling, end)
    tokens = itertools.takewhile(lambda token: token != end, tokens)
    for text in texts(tokenizer, args.prompt, ids, tokens):
        if not args.json:
            print(text[len(shown) :], end="", flush=True)
        shown = text
    if args.json:
        own = {"prompt": args.prompt, "tokens": args.tokens}
        is_text = tokenizer.kind != "none"
        print_json({"text": shown if is_text else None, **own, "ids": ids})
    else:
        print()


def texts(
    tokenizer: Tokenizer, prompt: str | None, ids: list[int], tokens: Iterable[int]
) -> Iterator[str]:
    """Yields the prompt, and it again with what follows, each time more of it; adds the
    tokens to `ids`.

    Many tokenizers do not give a text back as it was (a space before the first word,
    small letters), so that the prompt stays as it was typed. A character whose last
    bytes are still to come is not shown.
    """
    decoded = tokenizer.decode(ids)
    head, prompt = (0, "") if prompt is None else (len(decoded), prompt)
    whole = prompt + decoded[head:]
    shown = whole.rstrip("\ufffd")
    yield shown
    for token in tokens:
        ids.append(token)
        whole = prompt + tokenizer.decode(ids)[head:]
        if not whole.endswith("\ufffd") and whole.startswith(shown):
            shown = whole
            yield shown
    if whole != shown:
        yield whole


def _check(args: Args) -> None:
    if (args.prompt is None) == (not args.prompt_ids):
        raise ValueError(
            "give a text to go on from, --prompt TEXT, or ids, --prompt-ids 1 2 3. "
            f"Got {'both' if args.prompt_ids else 'neither'}."
        )
    if args.prompt is not None and (at := _no_text(args.prompt)) is not None:
        raise ValueError(
            f"prompt must be text in UTF-8. Got {args.prompt[at]!r} at {at}."
        )


def _widened(args: Args, variables: Variables) -> Variables:
    if ops.PACKED not in variables:
        raise ValueError(
            "wide needs an export, whose weights are packed (trix-jax export). "
            f"Got {args.checkpoint}, whose weights are not."
        )
    return widen(variables)


def _end(args: Args, tokenizer: Tokenizer) -> int | None:
    """The id to stop at; None for none."""
    if args.until_end and tokenizer.eot is None:
        raise ValueError(
            f"until_end needs an end-of-text mark, and the tokenizer of {args.checkpoint} "
            "has none: leave it out, and --tokens ends the text."
        )
    return tokenizer.eot if args.until_end else None


def _no_text(prompt: str) -> int | None:
    """Where a prompt holds half a character, as bytes that are no UTF-8 leave; None if
    nowhere.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
