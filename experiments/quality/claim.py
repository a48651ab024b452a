"""The settings of the claim: English Wikipedia, every token seen at most once, Muon.

First the body around the FFN, chosen by the dense FFN at its best rate (`BODY`).
"""

from experiments.quality.arms import Arm
from experiments.quality.design import Setting, Step

PRESET = "experiments/quality/wikipedia.yaml"
D64 = "--model.d-model 64 --model.n-heads 2"
DENSE_256 = "--arm dense --model.ffn-width 256"


def body(name: str, *flags: str) -> Arm:
    """The dense FFN, four times as wide as the model, in another body."""
    return Arm(f"body-{name}", " ".join((DENSE_256, *flags)), 4e-3)


ROTARY, RMS = "--model.positions rotary", "--model.norm rms"
QK, FAN_IN = "--model.qk-norm", "--model.init fan_in"
MODERN = f"{ROTARY} {RMS} {QK}"

# The names say what differs from GPT-2's body.
BODY = Setting(
    "wikipedia-64-body",
    PRESET,
    flags=D64,
    groups={
        "first": (
            body("gpt2"),
            body("modern", MODERN),
            body("fan-in", FAN_IN),
            body("modern-fan-in", MODERN, FAN_IN),
        ),
        "parts": (body("rotary", ROTARY), body("qk", QK), body("rms", RMS)),
        "documents": (body("modern-documents", MODERN, "--model.document-mask"),),
    },
    order=(
        Step("first", 1),
        Step("parts", 1),
        Step("documents", 1),
        Step("first", 3),
    ),
)

SETTINGS = {setting.name: setting for setting in (BODY,)}
