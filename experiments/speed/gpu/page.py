"""The tables of `kernels/README.md` that a GPU measured, from committed files.

    python -m experiments.speed.gpu.page

writes between the lines `<!-- gpu: NAME -->` and `<!-- end -->`. `packed` comes from
`measured/h100.json`, which `trix_kernels.measure` and two further sessions wrote; the
others from `measured/measured.jsonl`, which `experiments.speed.gpu` writes, once one is
committed.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.front_page import filled
from experiments.speed.gpu import record
from experiments.speed.gpu.layer import ACTIVE, EQUAL
from experiments.speed.gpu.timing import Row
from trix_jax.lm.experiment.tables import table

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "kernels" / "README.md"
MEASURED = ROOT / "experiments" / "speed" / "measured"
H100 = MEASURED / "h100.json"
GPU = MEASURED / record.NAME
# Of the matmuls cut otherwise, the ones shipped since.
SHIPPED = {"rows": 64, "stages": 2, "block": 256, "features": None}
WAYS = ("trix", EQUAL, ACTIVE)
NOTHING = "Not measured yet: no GPU was lent since the command was written.\n"


def packed() -> str:
    """Every packed kernel beside cuBLAS on whole weights, fastest first."""
    found = json.loads(H100.read_text("utf-8"))
    shipped, rows = shipped_us(found), []
    for kernel in found["first"]["kernels"]:
        name, us = kernel["name"], kernel["us"]
        ours, whole = shipped[name], us.get("bfloat16")
        if whole is not None:
            rows.append((whole / ours, name, ours, whole, us["xla"]))
    return table(
        ["op", "ours, us", "bfloat16, us", "**bfloat16 / ours**", "XLA, us"],
        [
            [name, f"{ours:.1f}", f"{whole:.1f}", f"**{times:.2f}**", f"{xla:,.0f}"]
            for times, name, ours, whole, xla in sorted(rows, reverse=True)
        ],
    )


def shipped_us(found: dict[str, Any]) -> dict[str, float]:
    """Microseconds of every packed op as it is shipped since."""
    us = {k["name"]: k["us"] for k in found["first"]["kernels"]}
    ours = {name: t.get("two_matmuls", t["kernel"]) for name, t in us.items()}
    shipped = (v for v in found["variants"] if SHIPPED.items() <= v.items())
    return ours | {v["name"]: v["us"] for v in shipped}


def rows_of(part: str) -> list[Row]:
    """The rows of the last line of a part that has some, ended or not; none without a
    committed file.
    """
    lines = [line for line in record.read(GPU) if line["part"] == part]
    return next((rows for line in reversed(lines) if (rows := record.rows(line))), [])


def _us(row: Row) -> float:
    """CUPTI's time where there is one, else the clock's."""
    return row.get("kernel_us") or row["us"]


def _grouped(
    rows: Iterable[Row], *keys: str, needs: Sequence[str] = ()
) -> dict[tuple, dict[str, Row]]:
    """Timed rows by their keys, and in each group by their way. A group that lacks a way
    that it needs, since one failed or the part did not end, is left out.

    Raises:
        ValueError: two rows of a group have the same way.
    """
    found: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "us" not in row:
            continue
        ways = found.setdefault(tuple(row[key] for key in keys), {})
        if (way := row["way"]) in ways:
            raise ValueError(
                f"{GPU} must have one row of a way for the same {', '.join(keys)}. Got "
                f"{ways[way]['name']!r} and {row['name']!r}."
            )
        ways[way] = row
    return {key: ways for key, ways in found.items() if ways.keys() >= set(needs)}


def products() -> str:
    """The grouped products beside everybody else's, best configuration of each."""
    others = {"lax.ragged_dot": "lax.ragged_dot", "jax's kernel": "jax's kernel"}
    others |= {"tokamax": "tokamax"}
    beside, rows = _grouped(rows_of("baselines"), "product"), []
    mine = _grouped(rows_of("products"), "product", needs=("ours", "batched"))
    for (name,), ways in mine.items():
        cells = [name, f"{_us(ways['ours']):.1f}", f"{_us(ways['batched']):.1f}"]
        for start in others:
            taken = [
                _us(row)
                for way, row in beside.get((name,), {}).items()
                if way.startswith(start)
            ]
            cells.append(f"{min(taken):.1f}" if taken else "")
        rows.append(cells)
    head = ["product", "ours, us", "cuBLAS, equal groups, us", *others]
    return table(head, rows) if rows else NOTHING


def layer() -> str:
    """Speed of the layer against dense FFNs: their time over its own, by the clock."""
    rows = [
        [
            f"{what}, {tiles} tiles",
            f"{ways['trix']['us'] / 1e3:.2f}",
            *(f"{ways[way]['times_the_first']:.2f}" for way in (EQUAL, ACTIVE)),
        ]
        for (tiles, what), ways in _grouped(
            rows_of("layer"), "tiles", "what", needs=WAYS
        ).items()
    ]
    head = ["", "ours, ms", f"over {EQUAL}", f"over {ACTIVE}"]
    return table(head, rows) if rows else NOTHING


def _tokens(part: str, key: str, memory: str, about: Callable[[int], str]) -> str:
    """Tokens a second beside the dense twins', and bytes."""
    rows = []
    for (value,), ways in _grouped(rows_of(part), key, needs=WAYS).items():
        speed = {way: row["tokens_per_second"] for way, row in ways.items()}
        cells = [about(value), f"{speed['trix']:,}"]
        cells += [f"{speed['trix'] / speed[way]:.2f}" for way in (EQUAL, ACTIVE)]
        cells += [f"{ways[way][memory] / 1e9:.2f}" for way in ("trix", EQUAL)]
        rows.append(cells)
    head = ["", "tokens a second", f"over {EQUAL}", f"over {ACTIVE}"]
    head += ["GB", f"GB, {EQUAL}"]
    return table(head, rows) if rows else NOTHING


def step() -> str:
    """The language model's training step; GB at the peak."""
    return _tokens("step", "tiles", "peak_bytes", lambda n: f"{n} tiles")


def generation() -> str:
    """Generation after a prompt; GB of the served model."""
    return _tokens("generation", "batch", "served_bytes", lambda n: f"batch {n}")


PARTS = {p.__name__: p for p in (packed, products, layer, step, generation)}


def page() -> str:
    """The page with its generated parts made anew."""
    return filled(PAGE.read_text("utf-8"), PARTS, "gpu")


def main() -> None:
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
