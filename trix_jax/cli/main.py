"""`trix-jax VERB`: finds the verb, and turns what goes wrong into a sentence and an
exit code.
"""

import difflib
import importlib
import os
import sys

from trix_jax.cli import compilations, flags
from trix_jax.cli.common import silence
from trix_jax.lm.allocator import keep_freed_memory
from trix_jax.lm.signals import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    PIPE_CLOSED,
    Interrupted,
)

VERBS = {
    "demo": "train a small TriX and two dense models, compare, pack, generate, report: minutes on a laptop, no download",
    "prepare": "text to a tokenizer and a verified token store",
    "train": "train a preset, or go on with the run in --workdir",
    "experiment": "run sizes x arms x seeds side by side, or plan or render them",
    "report": "write the report of a run or an experiment again",
    "eval": "restore and evaluate",
    "generate": "restore and sample",
    "export": "write packed safetensors, config and tokenizer",
    "track": "send metrics to TensorBoard or Weights & Biases",
    "push": "upload an export to a model hub",
    "inspect": "show routing and weights as one HTML page; diff, pin, forbid or hold routes",
    "import": "read a PyTorch TriX checkpoint",
    "bench": "speed of the layers on this machine, as ratios",
    "aot": "compile kernels and train steps for a GPU that is not here",
    "doctor": "check the installation and say what runs where",
}


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit code: 0 done, 1 failed, 2 bad usage or input, 75
    interrupted after saving.
    """
    argv = sys.argv[1:] if argv is None else argv
    _open_standard_streams()
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        print(_usage())
        return DONE
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"trix-jax: {verb!r} is no verb.{hint}\n\n{_usage()}", file=sys.stderr)
        return BAD_INPUT
    if wrong := flags.mistake(verb, rest):
        print(f"trix-jax {verb}: {wrong}", file=sys.stderr)
        return BAD_INPUT
    rest = _keep_compilations(verb, rest)
    keep_freed_memory()
    try:
        return importlib.import_module(f"trix_jax.cli.{verb}").main(rest) or DONE
    except SystemExit as stop:  # the parser has said what is wrong, or printed help
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("trix"):
            raise
        print(
            f"trix-jax {verb} needs {error.name}, which the lm extra brings: pip install -e '.[lm]' in a clone.",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        print("trix-jax: stopped.", file=sys.stderr)
        return 130
    except Interrupted as stop:
        print(f"trix-jax {verb}: {stop}", file=sys.stderr)
        return PIPE_CLOSED if stop.by == "SIGPIPE" else INTERRUPTED
    except BrokenPipeError:  # what read our output has seen enough
        silence(sys.stdout)
        return PIPE_CLOSED
    except (
        ValueError,
        ArithmeticError,
        OSError,
        RuntimeError,
        NotImplementedError,
    ) as error:
        return _explain(verb, error)


def _keep_compilations(verb: str, argv: list[str]) -> list[str]:
    """Keeps what XLA compiles unless a flag says no, or several processes train one
    run, of which JAX would have one alone read and write; returns the other flags.
    """
    named = [flag.replace("_", "-").partition("=")[0] for flag in argv]
    if flags.ANY_VERB in named:
        compilations.keep_nothing(os.environ)
    elif verb in compilations.VERBS and "--distributed" not in named:
        compilations.keep(os.environ, lambda text: print(text, file=sys.stderr))
    pairs = zip(argv, named, strict=True)
    return [flag for flag, name in pairs if name != flags.ANY_VERB]


def _open_standard_streams() -> None:
    """Where one is closed (`>&-`), what is written goes nowhere; otherwise the next file
    that is opened would take its place, and its lines.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = sys.stdout or os.fdopen(os.dup(1), "w")
    sys.stderr = sys.stderr or os.fdopen(os.dup(2), "w")


def _usage() -> str:
    rows = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    return f"usage: trix-jax VERB [options]\n\n{rows}\n\n`trix-jax VERB --help` lists a verb's options; `{flags.ANY_VERB}` keeps nothing of what it compiles."


def _explain(verb: str, error: Exception) -> int:
    from trix_jax.lm import hosts

    print(f"trix-jax {verb}: {error}", file=sys.stderr)
    is_input = isinstance(error, ValueError | FileNotFoundError)
    code = BAD_INPUT if is_input else FAILED
    hosts.leave_if_joined(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
