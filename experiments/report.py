"""Every report of the experiments, from the committed results.

    python -m experiments.report

writes quality/REPORT.md with its figures, and the REPORT.md of every experiment in
scale/ that has results; of the figures there, those that need no run directory.
"""

from pathlib import Path

from experiments.quality import report as quality
from trix_jax.cli.experiment import parse_run
from trix_jax.lm.experiment.report import write_experiment_report
from trix_jax.lm.experiment.spec import RESULTS, read_experiment

SCALE = Path(__file__).parent / "scale"


def main() -> None:
    print(quality.write())
    for path in sorted(SCALE.glob("*.yaml")):
        directory = SCALE / path.stem
        if (directory / RESULTS).exists():
            experiment = read_experiment(path, parse_run)
            print(write_experiment_report(directory, experiment=experiment))


if __name__ == "__main__":
    main()
