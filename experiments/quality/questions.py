"""What the report asks: groups of arms, each compared with one; a section each."""

from typing import NamedTuple


class Question(NamedTuple):
    """A group of arms, compared with one."""

    title: str
    group: str
    base: str
    about: str


QUESTIONS = (
    Question(
        "What to hold, and when?",
        "holding",
        "tiles-64-held",
        "`held` reads the signatures after a tenth of the training and keeps them. "
        "`scores` keeps the router's input too, `routes` each token's tiles and gates.",
    ),
    Question(
        "Who else may choose the tiles?",
        "routes",
        "tiles-64-held",
        "`moving` are signatures as they are read at every step, `random` and `learned` "
        "rows of the router's own.",
    ),
    Question(
        "What else makes tiles worth more?",
        "worth",
        "tiles-64-held",
        "`late` begins with real weights, `shared` has a small dense part beside three "
        "tiles, `fine` takes sixteen tiles a quarter as wide.",
    ),
    Question(
        "What does being ternary cost?",
        "ternary",
        "tiles-64-hash",
        "`float` keeps real weights, `late` until 30% of the training, `later` 70%; "
        "`channel` has a scale an output, `progressive` a staircase that sharpens, "
        "`threshold` the rule of ternary weight networks.",
    ),
    Question(
        "As much compute as memory?",
        "balanced",
        "tiles-64-hash",
        "At two bits a weight four of 64 tiles take half as much compute as memory, as "
        "widths. An `eighth` of the tiles a token, or half of all, is level.",
    ),
    Question(
        "And with a small real FFN among them?",
        "together",
        "tiles-64-hash-eighth",
        "`shared`: seven tiles and a real FFN of a tile's width, always on; by the hash or "
        "by held signatures of signs.",
    ),
    Question(
        "And with routes that stay?",
        "fixed",
        "tiles-64-hash-eighth-shared",
        "Signatures are signs. `routes`: each token's tiles and gates stay; `ungated`: "
        "gates are one, as with the hash; `table`: both; `early-table`: after a fiftieth "
        "of the training.",
    ),
    Question(
        "Do tiles want a rate of their own?",
        "ffn-rates",
        "tiles-64-hash",
        "FFNs' projections learn at a multiple of the arm's best rate.",
    ),
    Question(
        "And with another hash in every layer?",
        "layers-ffn",
        "tiles-64-hash-eighth-shared-layers",
        "The same.",
    ),
    Question(
        "And more of them?",
        "more",
        "tiles-64-hash-eighth-shared-layers",
        "An eighth a token, with the real FFN.",
    ),
    Question(
        "Which body?",
        "bodies",
        "body-gpt2",
        "Chosen by a dense FFN: `modern` is rotary positions, RMSNorm and QK-norm; "
        "`fan-in` initializes with 1/sqrt(fan-in).",
    ),
)
