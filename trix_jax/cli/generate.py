"""`trix-jax generate --checkpoint DIR --prompt TEXT`."""

import dataclasses
import itertools
from typing import Annotated

import tyro

from trix_jax.cli.common import print_json
from trix_jax.lm.presets import parse
from trix_jax.lm.serve.generate import SamplingConfig, generate
from trix_jax.lm.serve.load import load_run


@dataclasses.dataclass(frozen=True)
class Args:
    """Restore a run or an export and sample from it."""

    checkpoint: str
    """The run directory, or an export."""
    prompt: str
    """The text to go on from."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=SamplingConfig
    )
    tokens: int = 300
    """How many tokens to add."""
    step: str = "latest"
    """Of a run: latest (the newest good one), best, or a number."""
    json: bool = False
    """End standard output with the text as one line of JSON."""


def main(argv: list[str]) -> None:
    """Prints the prompt and what follows it, as it comes."""
    args = parse(Args, argv, "generate")
    if (at := _no_text(args.prompt)) is not None:
        raise ValueError(
            f"prompt must be text in UTF-8. Got {args.prompt[at]!r} at {at}."
        )
    model, variables, tokenizer = load_run(args.checkpoint, args.step)
    prompt = tokenizer.encode(args.prompt)
    ids = [*map(int, prompt)]
    shown = ""
    tokens = generate(model, variables, prompt, args.tokens, args.sampling)
    for token in itertools.chain([None], tokens):
        ids += [] if token is None else [token]
        text = tokenizer.decode(ids)
        # The last character of a byte sequence may not be whole yet.
        if not args.json and not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(ids)
    if args.json:
        print_json({"text": text, "prompt": args.prompt, "tokens": args.tokens})
    else:
        print(text[len(shown) :])


def _no_text(prompt: str) -> int | None:
    """Where a prompt holds half a character, as bytes that are no UTF-8 leave; None if
    nowhere.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
