"""Every report of the experiments, from the committed results.

    python -m experiments.report

writes quality/REPORT.md and APPENDIX.md with their figures, the tables of the front page and of the
results page, those of a GPU in kernels/README.md, and the REPORT.md of every experiment
in scale/ that has results; of the figures there, those that need no run directory.
"""

from pathlib import Path

from experiments import front_page
from experiments.quality import report as quality
from experiments.speed.gpu import choices
from experiments.speed.gpu import page as gpu_page
from trix_jax.cli.experiment import parse_run
from trix_jax.lm.experiment.report import write_experiment_report
from trix_jax.lm.experiment.spec import RESULTS, Experiment, read_experiment

SCALE = Path(__file__).parent / "scale"


def main() -> None:
    print(quality.write())
    front_page.main()
    gpu_page.main()
    choices.main()
    for name, experiment in with_results().items():
        print(write_experiment_report(SCALE / name, experiment=experiment))


def with_results() -> dict[str, Experiment]:
    """The experiments of scale/ whose results are committed, by name."""
    names = sorted(path.parent.name for path in SCALE.glob(f"*/{RESULTS}"))
    return {name: read_experiment(SCALE / f"{name}.yaml", parse_run) for name in names}


if __name__ == "__main__":
    main()
