"""Everything that is measured on a GPU, in parts, each row kept as it comes.

    python -m experiments.speed.gpu --output DIR

writes `DIR/measured.jsonl`. The same command goes on: it repeats the parts that failed, by
an error or by a check, after those that it has not tried, and no other that is in the
file. `--parts` chooses, `--minutes` leaves out a part that would not fit, `--list` tells
the parts, `--rehearse` runs all of it on any machine with tiny shapes.

The parts run in a process of their own, which is watched (`watch.py`): one that ends it,
or takes `watch.LIMIT` times its seconds, fails alone.

Returns 0 if every chosen part is in the file and none failed, 1 if one failed, 2 for arguments that make
no sense, 3 if the minutes were too few.
"""

import argparse
import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jax

from experiments.speed.gpu import machine, record, watch
from experiments.speed.gpu.parts import PARTS
from experiments.speed.gpu.shapes import FULL, REHEARSAL, Shapes
from experiments.speed.gpu.timing import Row, on_gpu
from experiments.speed.gpu.watch import TOO_FEW_MINUTES
from trix_jax.lm.signals import BAD_INPUT, DONE, FAILED
from trix_jax.lm.train.metrics import git_commit


def main(argv: Sequence[str] | None = None) -> int:
    began, args = time.monotonic(), parsed(argv)
    if not (args.list or args.rehearse or args.here):
        return watch.watched(args.parts, args.output / record.NAME, args.minutes)
    # The models of a step lie on the device together; JAX would take three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:16} {part.seconds:4} s  {part.about}")
        return DONE
    shapes = REHEARSAL if args.rehearse else FULL
    if not (args.rehearse or on_gpu()):
        print("There is no GPU here. --rehearse runs tiny shapes.", file=sys.stderr)
        return BAD_INPUT
    path = args.output / record.NAME
    about = {"shapes": shapes.name, "device": jax.devices()[0].device_kind}
    try:
        record.check(path, record.read(path), about)
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    with kept_compilations(args.output / "compiled"):
        return run(args, shapes, about, began)


def run(
    args: argparse.Namespace,
    shapes: Shapes,
    about: dict[str, str],
    began: float,
) -> int:
    """Measures the chosen parts that the file does not have, those first that it has not
    tried, and returns the exit code.
    """
    path = args.output / record.NAME
    lines, failed, left_out = record.read(path), False, False
    done, tried = record.measured(lines), {line["part"] for line in lines}
    for name in sorted(args.parts, key=lambda name: name in tried):
        if name in done:
            continue
        left = 60 * args.minutes - (time.monotonic() - began)
        if left < PARTS[name].seconds and not args.rehearse:
            print(f"{name} is left out: {left:.0f} s are left.", flush=True)
            left_out = True
            continue
        line = measured(name, shapes, path, about)
        failed |= bool(record.failures(line))
        print(*told(line), sep="\n", flush=True)
    return FAILED if failed else TOO_FEW_MINUTES if left_out else DONE


@contextlib.contextmanager
def kept_compilations(folder: Path) -> Iterator[None]:
    """Parts, and runs that go on, share what they compile."""
    changed = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    for name, value in changed.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.gpu", description=__doc__
    )
    parser.add_argument("--output", type=Path, help="folder of measured.jsonl")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART"
    )
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="that all parts may take"
    )
    parser.add_argument("--list", action="store_true", help="tell the parts")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on any machine")
    parser.add_argument(
        "--here", action="store_true", help="in this process, which nobody watches"
    )
    args = parser.parse_args(argv)
    if not (args.list or args.output):
        parser.error("--output must name a folder")
    if not args.minutes > 0:
        parser.error(f"--minutes must be positive. Got {args.minutes}.")
    return args


def measured(
    name: str, shapes: Shapes, path: Path, about: dict[str, str]
) -> record.Line:
    """A part's line: its rows, and what went wrong, which ends this part alone. The file
    has it from the beginning.
    """
    began = time.monotonic()
    line: record.Line = {"part": name, "git_commit": git_commit(), **about}
    rows: list[Row] = []
    open_ = {"unfinished": True, "error": "it did not end", "started": time.time()}
    record.append(path, line | open_ | {"rows_before_error": rows})
    try:
        for row in PARTS[name].rows(shapes):
            rows.append(row)  # one by one, so that those before an error are kept
            record.append(path, line | open_ | {"rows_before_error": rows})
        line["rows"] = rows
    except Exception as error:
        # Whatever it is: the next parts are worth their minutes.
        message = record.portable(str(error))
        line["error"] = f"{type(error).__name__}: {message[:600]}"
        line["traceback"] = record.portable(traceback.format_exc())[-4000:]
        line["rows_before_error"] = rows
    if on_gpu():  # compiled programs and arrays hold its memory
        line["clocks"] = machine.clocks()["nvidia_smi"]  # while it is warm
        jax.clear_caches()
        gc.collect()
    line["seconds"] = round(time.monotonic() - began, 1)
    line["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    record.append(path, line)
    return line


def told(line: record.Line) -> list[str]:
    """What a line says, in words."""
    failures = record.failures(line)
    head = f"{line['part']}: {line['seconds']} s" + (", FAILED" if failures else "")
    rows = [
        f"  {row['name']}: {row.get('kernel_us') or row['us']:.1f} us"
        for row in record.rows(line)
        if "us" in row
    ]
    return [head, *(f"  {failure}" for failure in failures), *rows]


if __name__ == "__main__":
    sys.exit(main())
