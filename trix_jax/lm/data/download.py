"""Files of a data set from the hub: parallel, resumed, checked.

A file's sha256 and size are those that the hub states at the pinned revision. Files
land in `$XDG_CACHE_HOME/trix_jax/REPO/REVISION`. What has arrived of one that was
interrupted is kept as `.partial`, and only the rest is asked for: huggingface_hub's own
download (2.4) throws it away, so this calls the `http_get` below it. Next to them
`hub.json` notes the hashes, so that files that are there need no network.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trix_jax.files import cache_folder, file_sha256, needing_cache, write_whole
from trix_jax.lm.data.datasets import Dataset

JOBS = 4  # files at a time
SECONDS_BETWEEN_LINES = 10.0
NOTES = "hub.json"
GB = 1e9

Report = Callable[[str], None]
_checked: set[tuple[Path, str]] = set()  # hashed by this process


def fetch(
    dataset: Dataset, report: Report = print, cache: Path | None = None
) -> list[Path]:
    """Downloads the files of a data set that are not there yet; returns all of them.

    Args:
        dataset: what to fetch.
        report: takes a line now and then.
        cache: a folder in place of `$XDG_CACHE_HOME/trix_jax`.

    Raises:
        ValueError: the hub refuses: no token, a revoked one, terms not accepted.
        ConnectionError: the hub cannot be reached, or went away half-way.
        RuntimeError: a file is not at the hub, or is not what it says it is.
        OSError: too little room, or no folder that can be written; says what to set.
    """
    folder = folder_of(dataset, cache)
    known = _read_notes(folder)
    wanted = _wanted(dataset, folder, known)
    missing = {
        name: note
        for name, note in wanted.items()
        if not (folder / name).is_file()
        or (folder / name).stat().st_size != note["bytes"]
    }
    if missing:
        with needing_cache(folder):
            tokens = _token_bytes(dataset, wanted)
            _download(dataset, folder, missing, tokens, report)
    for name, note in wanted.items():
        _verify(dataset, folder / name, name, note["sha256"])
    return [folder / name for name in wanted]


def folder_of(dataset: Dataset, cache: Path | None = None) -> Path:
    """Where the files of a data set lie."""
    name = dataset.repo.replace("/", "--")
    return (cache or cache_folder()) / name / dataset.revision[:12]


def _wanted(dataset: Dataset, folder: Path, known: dict) -> dict[str, dict[str, Any]]:
    """Files of the data set, each with its bytes and sha256; from the notes if they
    have all of them, else from the hub.
    """
    key = json.dumps([dataset.files, dataset.most])
    if key not in known:
        with needing_cache(folder):  # before the hub is asked
            folder.mkdir(parents=True, exist_ok=True)
        known[key] = _ask(dataset)
        with needing_cache(folder):
            write_whole(folder / NOTES, json.dumps(known, indent=1))
    return known[key]


def _ask(dataset: Dataset) -> dict[str, dict[str, Any]]:
    api = _api()
    where = {"repo_type": "dataset", "revision": dataset.revision}
    found = {}
    with _explained(dataset):
        names = [name for name in dataset.files if not name.endswith("/")]
        entries = api.get_paths_info(dataset.repo, names, **where) if names else []
        for prefix in (name for name in dataset.files if name.endswith("/")):
            tree = api.list_repo_tree(dataset.repo, prefix.rstrip("/"), **where)
            shards = sorted(
                (e for e in tree if e.path.endswith(".parquet")), key=lambda e: e.path
            )
            names += [prefix] if not shards else []
            entries += shards[: dataset.most]
    for entry in entries:
        lfs = getattr(entry, "lfs", None)
        if lfs is None:
            raise RuntimeError(
                f"{dataset.repo} states no sha256 for {entry.path}, so it cannot be checked."
            )
        found[entry.path] = {"bytes": lfs.size, "sha256": lfs.sha256}
    if absent := [name for name in names if name not in found]:
        raise RuntimeError(
            f"{dataset.repo} at revision {dataset.revision[:12]} has no {absent[0]}."
        )
    return found


def _download(
    dataset: Dataset, folder: Path, missing: dict, tokens: int, report: Report
) -> None:
    total = sum(note["bytes"] for note in missing.values())
    there = _have(folder, missing)
    _check_room(folder, total - there, tokens, dataset, report)
    names, failures = list(missing), []

    def work() -> None:
        while names and not failures:
            try:
                name = names.pop(0)
                _download_file(dataset, folder / name, name, missing[name]["bytes"])
            except Exception as error:
                failures.append(error)

    # Daemons, so that a signal ends the program and not only the wait for them.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(JOBS)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while busy := [thread for thread in threads if thread.is_alive()]:
        busy[0].join(SECONDS_BETWEEN_LINES)
        have = _have(folder, missing)
        rate = max(have - there, 0) / max(time.monotonic() - began, 1e-9)
        report(
            f"{dataset.repo}: {have / GB:.2f} of {total / GB:.2f} GB, {rate / 1e6:.1f} MB/s"
        )
    if failures:
        with _explained(dataset):
            raise failures[0]


def _download_file(dataset: Dataset, path: Path, name: str, num_bytes: int) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (
        WeakFileLock,
        build_hf_headers,
        disable_progress_bars,
    )

    disable_progress_bars()  # one line for all files instead
    partial = _partial(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    url = hf_hub_url(
        dataset.repo,
        name,
        repo_type="dataset",
        revision=dataset.revision,
        endpoint=_endpoint(),
    )
    with WeakFileLock(path.with_name(f"{path.name}.lock")), partial.open("ab") as file:
        if file.tell() > num_bytes:  # of nothing that is known
            file.truncate(0)
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=num_bytes,
        )
    os.replace(partial, path)


def _token_bytes(dataset: Dataset, files: dict[str, dict[str, Any]]) -> int:
    """Room that the tokens take: two bytes each, or four; and the split's val.

    All tokens of a data set are counted as large as its compressed files: FineWeb-Edu's
    sample of 28.5 GB holds 10 billion, 20 GB at two bytes each.
    """
    if dataset.tokens is None:
        return sum(file["bytes"] for file in files.values())
    return 4 * dataset.tokens


def _check_room(
    folder: Path, needed: int, tokens: int, dataset: Dataset, report: Report
) -> None:
    about = "about" if dataset.tokens is None else "up to"
    free = shutil.disk_usage(folder).free
    report(
        f"{dataset.repo} at {dataset.revision[:12]}: {needed / GB:.2f} GB to download to "
        f"{folder.name}, {about} {tokens / GB:.2f} GB of tokens after; {free / GB:.0f} GB free"
    )
    if free < needed + tokens:
        raise OSError(
            f"{dataset.repo} needs {(needed + tokens) / GB:.2f} GB and {folder} has "
            f"{free / GB:.2f} GB free: set XDG_CACHE_HOME to a larger disk."
        )


def _verify(dataset: Dataset, path: Path, name: str, sha256: str) -> None:
    if (path, sha256) in _checked:
        return
    got = file_sha256(path)
    if got != sha256:
        path.unlink()
        raise RuntimeError(
            f"{name} of {dataset.repo} must have sha256 {sha256}. Got {got}: the file is "
            "removed, and the same command downloads it again."
        )
    _checked.add((path, sha256))


class _explained:
    """Turns what the hub's client raises into a sentence."""

    def __init__(self, dataset: Dataset):
        self._dataset = dataset

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        from huggingface_hub import errors

        d = self._dataset
        cause = (
            error.__cause__
            if isinstance(error, errors.LocalEntryNotFoundError)
            else error
        )
        cause = cause or error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _refusal(d, cause.response.status_code, cause) from error
        if isinstance(
            error, errors.HTTPError | errors.LocalEntryNotFoundError | ConnectionError
        ):
            raise ConnectionError(
                f"{d.repo} could not be downloaded from {_endpoint() or 'the hub'} "
                f"({type(cause).__name__}: {str(cause).splitlines()[0]}). What has arrived "
                "is kept: the same command goes on."
            ) from error
        if isinstance(error, OSError) and "Consistency check failed" in str(error):
            raise ConnectionError(
                f"a download of {d.repo} ended early. What has arrived is kept: the same command goes on."
            ) from error


def _refusal(dataset: Dataset, status: int, error: Exception) -> Exception:
    duty = f" {dataset.duty}" if dataset.duty else ""
    where = f"{dataset.repo} at revision {dataset.revision[:12]}"
    match status:
        case 401:
            return ValueError(
                f"the hub does not accept the token for {dataset.repo} (HTTP 401): there is "
                f"none, or it was revoked or has expired; `hf auth login` sets one.{duty}"
            )
        case 403:
            return ValueError(
                f"the token may not read {dataset.repo} (HTTP 403): its account has not "
                f"accepted the terms, or it lacks the permission.{duty}"
            )
        case 404:
            return RuntimeError(
                f"the hub has no such repository, revision or file (HTTP 404): {where}, "
                f"{', '.join(dataset.files)}."
            )
        case _:
            return ConnectionError(
                f"the hub answered {status} for {where}. What has arrived is kept: the same "
                "command goes on."
            )


def _api():
    from huggingface_hub import HfApi

    return HfApi(endpoint=_endpoint())


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _read_notes(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / NOTES).read_bytes())
    except (OSError, ValueError):
        return {}


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _have(folder: Path, names) -> int:
    """Bytes that have arrived of some files."""
    paths = [folder / name for name in names]
    return sum(_size(p) for path in paths for p in (path, _partial(path)))


def _size(path: Path) -> int:
    """Bytes of a file; none where it is not there, or no more: a thread of the download
    may give it its name at this moment.
    """
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
