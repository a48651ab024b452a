"""`trix-jax inspect --checkpoint DIR`."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax import routing
from trix_jax.cli.common import print_json, say
from trix_jax.lm.presets import parse
from trix_jax.lm.serve.export import check_output, export
from trix_jax.nn.steering import layer_states


@dataclasses.dataclass(frozen=True)
class Args:
    """Look inside a run or an export: one HTML page, and questions to its routing."""

    checkpoint: str
    """The run directory, or an export."""
    step: str = "latest"
    """Of a run: latest (the newest good one), best, or a number."""
    data: str | None = None
    """A token store; by default the run's own."""
    output: str | None = None
    """The page; by default inspect.html in the checkpoint's directory."""
    against: str | None = None
    """Another run or export (or "step:N" of this run) whose routing is compared with
    this one's.
    """
    signature: str | None = None
    """LAYER:TILE, whose signature is read."""
    pin: tuple[str, ...] = ()
    """LAYER:TILE:CHARACTERS, whose tokens are sent to the tile, to see what it does to
    the loss.
    """
    forbid: tuple[str, ...] = ()
    """LAYER:TILE:CHARACTERS, whose tokens are kept from the tile."""
    freeze: str | None = None
    """Write an export here whose routes are held, whatever its weights become."""
    json: bool = False
    """End standard output with the result as one line of JSON."""


class Question(NamedTuple):
    """A flag's `LAYER:TILE:CHARACTERS`, read."""

    layer: int
    tile: int
    characters: str = ""


def main(argv: list[str]) -> None:
    """Writes the page and answers the questions."""
    args = parse(Args, argv, "inspect")
    asked = _read(args)
    if args.freeze:
        check_output(args.freeze)
    from trix_jax.lm.inspect import look, write_page
    from trix_jax.lm.serve.load import open_run_data

    report = say(args.json)
    store = open_run_data(args.checkpoint, args.data)
    found = look(args.checkpoint, store, args.step)
    page = write_page(found, args.output or Path(args.checkpoint) / "inspect.html")
    report(f"open {page}: it needs no network")
    answers: dict[str, Any] = {"page": str(page), "step": found["step"]}
    if any(asked.values()) or args.against or args.freeze:
        answers |= _answer(args, asked, store, report)
    if args.json:
        print_json(answers)


def _read(args: Args) -> dict[str, list[Question]]:
    """The flags that name layers and tiles, read before anything is loaded."""
    signature = (args.signature,) if args.signature else ()
    return {
        "signature": [_question(t, "--signature", "LAYER:TILE") for t in signature],
        "pin": [_question(t, "--pin", "LAYER:TILE:CHARACTERS") for t in args.pin],
        "forbid": [
            _question(t, "--forbid", "LAYER:TILE:CHARACTERS") for t in args.forbid
        ],
    }


def _question(text: str, flag: str, form: str) -> Question:
    layer, *rest = text.split(":", form.count(":"))
    if (
        len(rest) != form.count(":")
        or not (layer + rest[0]).isdecimal()
        or not rest[-1]
    ):
        raise ValueError(f"{flag} must be {form}. Got {text!r}.")
    return Question(int(layer), int(rest[0]), *rest[1:])


def _answer(args: Args, asked, store, report) -> dict[str, Any]:
    """What was asked beside the page."""
    from trix_jax.lm.inspect import route
    from trix_jax.lm.inspect.look import SEEN_TOKENS
    from trix_jax.lm.serve.load import load_run

    model, variables, tokenizer = load_run(args.checkpoint, args.step)
    ids = store.val.window(0, min(SEEN_TOKENS + 1, len(store.val)))
    seen = route(model, variables, ids)
    answers: dict[str, Any] = {}
    for question in asked["signature"]:
        answers["signature"] = _signature(seen, question)
        report(" ".join(f"{value:.3f}" for value in answers["signature"]))
    if args.against:
        answers["diff"] = _diff(args, seen, tokenizer, ids, report)
    if asked["pin"] or asked["forbid"]:
        steered = route(model, variables, ids, tuple(_orders(asked, tokenizer)))
        both = (float(s.losses.mean()) for s in (seen, steered))
        answers["loss"], answers["steered_loss"] = both
        report(
            f"loss of the first {len(seen.losses):,} validation tokens "
            f"{answers['loss']:.4f}, with these orders {answers['steered_loss']:.4f}"
        )
    if args.freeze:
        held = {**variables, "routing": routing.freeze_routing(seen.routing)}
        export(model, held, tokenizer, args.freeze)
        answers["frozen"] = args.freeze
        report(f"{args.freeze}: packed, routes held")
    return answers


def _signature(seen, question: Question) -> list[float]:
    from trix_jax.lm.inspect.routes import has_signatures

    states = list(layer_states(seen.routing).values())
    if question.layer >= len(states) or question.tile >= len(states[0]["signature"]):
        raise ValueError(
            f"--signature must name one of {len(states)} layers and of "
            f"{len(states[0]['signature'])} tiles. Got {question.layer}:{question.tile}."
        )
    if not has_signatures(states[question.layer]):
        raise ValueError(
            "--signature needs signatures: this model has a hash or a table of routes in "
            "their place."
        )
    return states[question.layer]["signature"][question.tile].tolist()


def _diff(args: Args, seen, tokenizer, ids, report) -> list[dict[str, Any]]:
    """This routing of the text beside that of another checkpoint, which read the same
    tokens.
    """
    from trix_jax.lm.inspect import diff, route
    from trix_jax.lm.serve.load import load_run

    other, step = str(args.against), "latest"
    if other.startswith("step:"):
        other, step = args.checkpoint, other.removeprefix("step:")
    model, variables, other_tokenizer = load_run(other, step)
    if model.config.ffn == "dense":
        raise ValueError(
            f"--against must be of a TriX arm. Got {args.against}, a dense model."
        )
    if other_tokenizer.decode(ids) != tokenizer.decode(ids):
        raise ValueError(f"--against must have the same tokenizer. Got {args.against}.")
    layers = diff(route(model, variables, ids), seen)
    for i, layer in enumerate(layers):
        line = f"block {i}: {layer['kept']:.1%} of the assignments are the same"
        if cosines := layer["signature_cosine"]:
            mean = sum(cosines) / len(cosines)
            line += f", mean cosine of a tile's two signatures {mean:.3f}"
        report(line)
    return layers


def _orders(asked, tokenizer):
    from trix_jax.lm.inspect import Order

    for name in ("pin", "forbid"):
        for layer, tile, characters in asked[name]:
            ids = {int(i) for letter in characters for i in tokenizer.encode(letter)}
            yield Order(layer, tile, tuple(sorted(ids)), name == "pin")
