"""Learning-rate sweeps and seeds for every arm, in nanoGPT's character setting.

    python experiments/quality/run.py --data input.txt [--jobs 2]

Each arm is swept with one seed, outwards from a start until the best rate has worse
ones on both sides; then the other seeds train with it, and last the rest of the grid.
Every run is a `trix-jax train` in a process of its own, pinned to a core; runs live
under --runs and are resumed or skipped when they are there already. The results file is
written anew after every run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import yaml

HERE = Path(__file__).parent
CONFIG = "configs/shakespeare_char.yaml"
SETTING = "shakespeare-char"
DIVERGED = "diverged"  # marks a run whose loss stopped being finite
GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
START = {  # where sketches had their best rates
    "dense": 4e-3,
    "sparse-16-top4": 4e-3,
    "sparse-4": 4e-3,
    "hierarchical-16": 2e-3,
    "lookup-16": 1e-3,
}
SEEDS = (42, 43, 44)
ARMS = {
    "dense": "--arm dense",
    "sparse-4": "--arm sparse --model.num-tiles 4",
    "sparse-16-top4": "--arm sparse --model.tiles-per-token 4",
    "hierarchical-16": "--arm hierarchical",
    "lookup-16": "--arm lookup",
}
# At the rate that suits sparse-16-top4: the gate that lets the task's gradient reach
# the routing.
ABLATIONS = {
    f"sparse-16-top4-gate-{gate}": f"{ARMS['sparse-16-top4']} --model.routing.gate {gate}"
    for gate in ("none", "softmax", "renormalized")
}
ABLATION_RATE = 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        required=True,
        help="TinyShakespeare's input.txt, or a store made from it",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument(
        "--results", type=Path, default=HERE / "results" / f"{SETTING}.json"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, help="fewer steps than the config's, to try the script out"
    )
    args = parser.parse_args()
    first, others = SEEDS[0], SEEDS[1:]
    run_all([(arm, START[arm], first) for arm in ARMS], args)
    run_all([("dense", GRID[1], seed) for seed in SEEDS], args)  # nanoGPT's own rate
    while missing := [
        (arm, rate, first) for arm in ARMS for rate in neighbours(arm, args)
    ]:
        run_all(missing, args)
    run_all([(arm, best_rate(arm, args), s) for arm in ARMS for s in others], args)
    run_all([(name, ABLATION_RATE, s) for s in SEEDS for name in ABLATIONS], args)
    run_all([(arm, rate, first) for arm in ARMS for rate in GRID[1:]], args)


def neighbours(arm: str, args: argparse.Namespace) -> list[float]:
    """Rates of the grid beside the best so far that have not been run: none once the
    optimum is inside.
    """
    at = GRID.index(best_rate(arm, args))
    beside = GRID[max(at - 1, 0) : at + 2]
    return [rate for rate in beside if not is_done(arm, rate, SEEDS[0], args)]


def is_done(arm: str, rate: float, seed: int, args: argparse.Namespace) -> bool:
    workdir = directory(arm, rate, seed, args)
    return any((workdir / name).exists() for name in ("summary.json", DIVERGED))


def run_all(runs: list[tuple[str, float, int]], args: argparse.Namespace) -> None:
    """Runs what is not done yet, `jobs` at a time."""
    cores = Queue()
    for i in range(args.jobs):
        cores.put(i)

    def one(run):
        core = cores.get()
        try:
            train(run[0], run[1], run[2], args, core)
        finally:
            cores.put(core)
        collect(args)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, dict.fromkeys(runs)))


def train(
    arm: str, rate: float, seed: int, args: argparse.Namespace, core: int
) -> None:
    """One run, in a process pinned to a core where the system can."""
    workdir = directory(arm, rate, seed, args)
    if is_done(arm, rate, seed, args):
        return
    workdir.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-c",
        "import sys; from trix_jax.cli import main; sys.exit(main())",
    ]
    command += [
        *shlex.split(flags(arm, rate, seed)),
        "--workdir",
        str(workdir),
        "--data.path",
        args.data,
    ]
    if args.steps:
        command += ["--train.steps", str(args.steps)]
    pin = (
        (lambda: os.sched_setaffinity(0, {core}))
        if hasattr(os, "sched_setaffinity")
        else None
    )
    with (workdir / "log.txt").open("a") as log:
        code = subprocess.run(
            command, stdout=log, stderr=log, preexec_fn=pin, check=False
        ).returncode
    if code == 1:
        (workdir / DIVERGED).touch()
    elif code:
        raise SystemExit(f"{workdir} ended with exit code {code}; see its log.txt.")
    print(f"{workdir.name}: exit code {code}", flush=True)


def flags(arm: str, rate: float, seed: int) -> str:
    return f"train {CONFIG} {(ARMS | ABLATIONS)[arm]} --train.learning-rate {rate:g} --seed {seed}"


def directory(arm: str, rate: float, seed: int, args: argparse.Namespace) -> Path:
    return args.runs / f"{arm}-lr{rate:g}-seed{seed}"


def best_rate(arm: str, args: argparse.Namespace) -> float:
    """The rate with the lowest final loss among those that have been run."""
    done = [rate for rate in GRID if is_done(arm, rate, SEEDS[0], args)]
    return min(done, key=lambda rate: loss_of(directory(arm, rate, SEEDS[0], args)))


def loss_of(workdir: Path) -> float:
    path = workdir / "summary.json"
    return (
        json.loads(path.read_text())["final_val_loss"]
        if path.exists()
        else float("inf")
    )


def collect(args: argparse.Namespace) -> None:
    """Writes the results of all finished runs."""
    results = []
    for arm in ARMS | ABLATIONS:
        for rate in GRID:
            for seed in SEEDS:
                workdir = directory(arm, rate, seed, args)
                if (workdir / "summary.json").exists():
                    results.append(result(arm, rate, seed, workdir))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n")


def result(arm: str, rate: float, seed: int, workdir: Path) -> dict:
    """A run's line in the results file (DESIGN.md, "Committed results")."""
    summary = json.loads((workdir / "summary.json").read_text())
    model = yaml.safe_load((workdir / "config.yaml").read_text())["model"]
    dense = model["ffn"] == "dense"
    width = model["ffn_width"] or model["expansion"] * model["d_model"]
    tile_width = (
        None
        if model["ffn"] == "lookup"
        else model["expansion"] * model["d_model"] // model["num_tiles"]
    )
    tiles = {"num_tiles": model["num_tiles"], "tile_width": tile_width}
    return {
        "setting": SETTING,
        "arm": arm,
        **({"width": width} if dense else tiles),
        "tiles_per_token": None if dense else model["tiles_per_token"],
        "seed": seed,
        "learning_rate": rate,
        "steps": summary["steps"],
        "tokens": summary["tokens"],
        "val_loss": summary["final_val_loss"],
        "best_val_loss": summary["best_val_loss"],
        "params_total": summary["params"]["total"],
        "ffn_active": summary["params"]["ffn_active"],
        "ffn_bits": summary["params"]["ffn_bits"],
        "min_entropy_share": summary["min_entropy_share"],
        "dead_tiles": summary["max_dead_tiles"],
        "seconds": round(summary["seconds"], 1),
        "command": f"trix-jax {flags(arm, rate, seed)}",
        "git_commit": summary["git_commit"],
    }


if __name__ == "__main__":
    main()
