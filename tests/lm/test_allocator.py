"""Freed memory stays with the process, or goes back to the system when it is told to."""

import subprocess
import sys

import pytest

from trix_jax.lm import allocator
from trix_jax.lm.config import RunConfig
from trix_jax.lm.train import loop

FAULTS = """
import ctypes, resource, runpy, sys
how, path = sys.argv[1:]
if how == "keep":  # without the package around it, which imports jax
    assert runpy.run_path(path)["keep_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
size = 48 << 20  # more than glibc ever keeps by itself
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    at = libc.malloc(size)
    ctypes.memset(at, 1, size)
    libc.free(at)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(sum(touch() for _ in range(4)))
"""

ARENAS = """
import ctypes, runpy, sys, threading
how, path = sys.argv[1:]
if how == "keep":
    assert runpy.run_path(path)["keep_freed_memory"]()
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(16)
def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out)
libc.fflush(out)
"""


def said(script, env, how):
    command = [sys.executable, "-c", script, how, allocator.__file__]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def untuned(user_env):
    return {
        k: v for k, v in user_env.items() if not k.startswith(("MALLOC_", "GLIBC_"))
    }


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_memory_that_is_kept_is_not_mapped_again(untuned):
    pages = 48 << 20 >> 12
    assert int(said(FAULTS, untuned, "default")) > 2 * pages
    assert int(said(FAULTS, untuned, "keep")) < pages / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")
def test_threads_share_the_arenas(untuned):
    assert said(ARENAS, untuned, "default").count("<heap nr=") > allocator.ARENAS
    assert said(ARENAS, untuned, "keep").count("<heap nr=") == allocator.ARENAS


def test_training_sets_the_allocator_before_jax_starts_threads(monkeypatch, tmp_path):
    def start_threads():
        raise KeyboardInterrupt("threads")

    called = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: called.append("kept"))
    monkeypatch.setattr(loop.jax, "devices", start_threads)
    with pytest.raises(KeyboardInterrupt, match="threads"):
        loop.train(RunConfig(), tmp_path / "run")
    assert called == ["kept"]


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not allocator.keep_freed_memory()


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert not allocator.keep_freed_memory()
    allocator.trim_memory()
