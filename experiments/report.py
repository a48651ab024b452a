"""Every report of the experiments, from the committed results.

    python -m experiments.report

writes quality/REPORT.md and APPENDIX.md, and scale/REPORT.md and ARMS.md, with their
figures, the tables of the front page and of the results page, and those of a GPU in
kernels/README.md.
"""

from experiments import front_page
from experiments.quality import report as quality
from experiments.scale import page as scale
from experiments.speed.gpu import choices
from experiments.speed.gpu import page as gpu_page


def main() -> None:
    print(quality.write())
    front_page.main()
    gpu_page.main()
    choices.main()
    scale.main()


if __name__ == "__main__":
    main()
