"""The claim in words a stranger knows: what tiles are, and what they are worth."""

from experiments.quality import curve
from experiments.quality.worth import Worth
from trix_jax.nn.transformer import TransformerConfig

OFF = {"above": "beyond the curve", "below": "short of the curve"}
USUAL = 0.1  # share of the training after which routing is held


def tiles_in_words(model: TransformerConfig) -> str:
    """`7 of 64 ternary tiles by a hash of the token, and a small real FFN`."""
    beside = ", and a small real FFN" if model.shared_width else ""
    number = f"{model.tiles_per_token} of {model.num_tiles}"
    return f"{number} ternary tiles by {chooser(model)}{beside}"


def chooser(model: TransformerConfig) -> str:
    """Who chooses the tiles, and how that is held."""
    routing = model.routing
    if routing.source == "hash":
        before = " and the one before" if model.router_input == "pair" else ""
        own = ", another in every layer" if model.hash_per_layer else ""
        return f"a hash of the token{before}{own}"
    whose = {"learned": "learned ", "random": "random "}.get(routing.source, "")
    if routing.hold_after is None:
        how = f"{whose}signatures that move"
    elif routing.hold == "routes":
        how = f"routes read off {whose}signatures and held"
    else:
        how = f"{whose}signatures that are held"
    if routing.hold_after not in (None, USUAL):
        how += f" after {routing.hold_after:.0%}"
    return f"{how}, ungated" if routing.gate == "none" else how


def estimate_text(found: curve.Estimate, digits: int) -> str:
    """A number with its interval; "below" and "above" for what is off the curve."""

    def text(value: float) -> str:
        if value == curve.BELOW:
            return "below"
        return "above" if value == curve.ABOVE else f"{value:.{digits}f}"

    middle, low, high = map(text, found)
    return middle if low == middle == high else f"{middle} ({low} to {high})"


def sentence_text(found: curve.Estimate, digits: int) -> str:
    """The same inside a sentence."""
    text = estimate_text(found, digits)
    for short, words in OFF.items():
        text = text.replace(short, words)
    return text


def worth_in_words(d: int, tiles: str, place: Worth) -> list[str]:
    """What tiles are worth at a width of the model, in two sentences."""
    widths = sorted(place.read.dense)
    seeds = "one seed, undecided" if place.seeds == 1 else f"{place.seeds} seeds"
    own = f"{place.width.greater:.0f}"
    comma = "," if "," in tiles else ""
    at = f"At width {d} of the model, {tiles}{comma} are worth"
    if place.equivalent.value == curve.BELOW:
        end = f"less than the dense FFN {widths[0]} wide, the narrowest that has run."
        return [f"{at} {end}", f"They take a width of {own}; {seeds}."]
    if place.equivalent.value == curve.ABOVE:
        if place.equivalent.low == curve.ABOVE:
            end = f"more than the dense FFN {widths[-1]} wide, the widest with as many seeds (95 %)."
            times = f"{widths[-1] / place.width.greater:.2f}"
            return [
                f"{at} {end}",
                f"That is more than {times} times the width that they take, {own}; {seeds}.",
            ]
        width, times = place.equivalent.low, place.multiplier.low
        return [
            f"{at} a dense FFN of width {width:.0f} or more (95 %).",
            f"That is {times:.2f} times the width that they take, {own}, or more; {seeds}. "
            f"Their mean is ahead of the dense FFN {widths[-1]} wide, the widest with as "
            "many seeds.",
        ]
    width, times = (
        sentence_text(place.equivalent, 0),
        sentence_text(place.multiplier, 2),
    )
    return [
        f"{at} a dense FFN of width {width}.",
        f"That is {times} times the width that they take, {own}; {seeds}.",
    ]
