"""An experiment as a job file: its runs, an index each, for the engine that a cluster
has.

Every job runs `trix-jax experiment FILE --workdir DIR --only RUN`, which goes on from
the run's checkpoint. Exit code 75 means saved and stopped: start again; 2 means bad
input: do not.
"""

import shlex
from collections.abc import Sequence
from typing import Literal

Engine = Literal["slurm", "kubernetes", "skypilot"]

HEAD = """\
# {name}: {count} runs on {engine}, one GPU each. Storage that all jobs mount is at {workdir}.
# First, once:   {prepare}
# Start:         {start}
# In the end:    trix-jax report {workdir}
"""
SLURM = """\
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{slots}
#SBATCH --gpus=1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
# TERM comes five minutes before the time is up: save, exit with 75, be queued again.

runs=(
{lines}
)
status=0
srun {command} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}" || status=$?
if [ "$status" -eq 75 ]; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""
KUBERNETES = """\
apiVersion: batch/v1
kind: Job
metadata:
  name: {name}
spec:
  completionMode: Indexed
  completions: {count}
  parallelism: {slots}
  backoffLimitPerIndex: 5
  maxFailedIndexes: {count}
  podFailurePolicy:
    rules:
      - action: FailIndex # bad input stays bad
        onExitCodes: {{ containerName: run, operator: In, values: [2] }}
      - action: Ignore # saved and stopped: does not count
        onExitCodes: {{ containerName: run, operator: In, values: [75] }}
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
  template:
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: 300
      containers:
        - name: run
          image: your-registry/trix-jax:0.1.0
          command: ["bash", "-c"]
          args:
            - |
              runs=(
{lines}
              )
              exec {command} --only "${{runs[$JOB_COMPLETION_INDEX]}}"
          resources:
            limits:
              nvidia.com/gpu: 1
          volumeMounts:
            - {{ name: runs, mountPath: {workdir} }}
      volumes:
        - name: runs
          persistentVolumeClaim:
            claimName: runs # ReadWriteMany
"""
SKYPILOT = """\
name: {name}
resources:
  accelerators: H100:1
  use_spot: true
  job_recovery:
    max_restarts_on_errors: 20 # 75 among them: saved and stopped
workdir: .
volumes:
  {workdir}: trix-runs # a network volume, not a bucket: checkpoints are put in place by a rename
envs:
  RUN: "0"
setup: |
  pip install -e ".[lm,cuda13]"
run: |
  runs=(
{lines}
  )
  {command} --only "${{runs[$RUN]}}"
"""
START = {
    "slurm": "sbatch {file}",
    "kubernetes": "kubectl apply -f {file}",
    "skypilot": "for i in $(seq 0 {last}); do sky jobs launch -y -d --env RUN=$i {file}; done",
}


def render(
    engine: Engine,
    name: str,
    runs: Sequence[str],
    experiment: str,
    workdir: str,
    slots: int,
) -> str:
    """The job file.

    Args:
        engine: which.
        name: of the job.
        runs: names of the runs, `SIZE/ARM/seed-N`.
        experiment: the experiment's file, as the jobs see it.
        workdir: the experiment's directory, as the jobs see it.
        slots: runs at a time.
    """
    command = shlex.join(
        ["trix-jax", "experiment", experiment, "--workdir", workdir, "--slots", "1"]
    )
    indent = {"slurm": 2, "kubernetes": 16, "skypilot": 4}[engine]
    last = len(runs) - 1
    values = {
        "name": "".join(c if c.isalnum() else "-" for c in name.lower()),
        "count": len(runs),
        "last": last,
        "slots": slots,
        "workdir": workdir,
        "engine": engine,
        "lines": "\n".join(" " * indent + shlex.quote(run) for run in runs),
        "command": command,
        "prepare": f"{command} --prepare-only",
        "start": START[engine].format(file="FILE", last=last),
    }
    body = {"slurm": SLURM, "kubernetes": KUBERNETES, "skypilot": SKYPILOT}[engine]
    shebang = "#!/bin/bash\n" if engine == "slurm" else ""
    return shebang + HEAD.format(**values) + body.format(**values)
