"""The text that a config names, as often as it is asked for, and what it was when a
store was made of it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.lm.data import origin, splits
from trix_jax.lm.data.config import DataConfig
from trix_jax.lm.data.files import SUFFIXES, TABLES, suffix_of
from trix_jax.lm.data.sides import apart, by_name, tell
from trix_jax.lm.data.sources import (
    Source,
    describe,
    infer_source,
    iter_documents,
    kind_of,
    local_files,
)

Report = Callable[[str], None]


def _quiet(line: str) -> None:
    pass


class Corpus(NamedTuple):
    """Text to divide or, with `val_path` or files whose names say so, text to train on
    and text to validate on.
    """

    config: DataConfig
    opened: origin.Opened
    val_opened: origin.Opened

    def survey(self, report: Report) -> splits.Survey:
        """The first reading, which notes the files and says what is passed over.

        Raises:
            ValueError: there is no text, or it cannot be divided.
        """
        config = self.config
        with_characters = config.tokenizer == "char"
        files = self._files(report)
        documents = self._documents(files.train, report, self.opened)
        if files.val is None:
            found = splits.survey(documents, config.val_fraction, with_characters)
        else:
            val = self._val_documents(files.val, report, self.val_opened)
            found = splits.survey_two(documents, val, with_characters)
            if not found.val_documents:
                where = f"The validation of path={config.path!r}"
                if config.val_path:
                    where = f"val_path={config.val_path!r}"
                raise ValueError(f"{where} holds no text.")
        if not found.documents:
            raise ValueError(
                f"source={config.source!r} at path={config.path!r} holds no text."
            )
        splits.tell_cut(found, report)
        if config.near_duplicates is None:  # else they are left out of training
            splits.tell_in_both(found, report)
        return found

    def sides(self, survey: splits.Survey) -> Iterator[tuple[str, str]]:
        """Yields `("train" | "val", text)`, in the same order every time."""
        files = self._files()
        documents = self._documents(files.train)
        if files.val is None:
            yield from splits.sides(documents, survey, self.config.val_fraction)
            return
        yield from (("train", text) for text in documents)
        yield from (("val", text) for text in self._val_documents(files.val))

    def side(self, name: str, survey: splits.Survey) -> Iterator[str]:
        """Yields the texts of one side."""
        return (text for side, text in self.sides(survey) if side == name)

    def describe(self) -> str:
        """One line on what it is, without this machine's folders."""
        said = describe(self.config.source, self.config.path)
        val = self.config.val_path
        if val is None and (count := len(self.val_opened.files)):
            return f"{said}; validation from {count} file(s) of it"
        return f"{said}; validation from {Path(val).name}" if val else said

    def note(self) -> dict[str, Any]:
        """What the manifest says of its files."""
        config = self.config
        noted = origin.note(self.opened, Path(config.path or ""))
        if config.val_path is None and not self.val_opened.files:
            return noted
        where = Path(config.val_path or config.path or "")
        return noted | {"val": origin.note(self.val_opened, where)}

    def changes(self, manifest: dict[str, Any], report: Report) -> str:
        """How it differs from what a store was made from, or nothing. A source that is
        gone is as it was.
        """
        config, now = self.config, self.describe()
        noted = manifest.get("sources", {"files": []})
        found = []
        if config.path is None and now != manifest["source"]:
            found.append(f"{manifest['source']}, now {now}")
        if config.path is not None:
            # Without validation that is gone nothing of the path is validation.
            is_gone = config.val_path is None or not Path(config.val_path).exists()
            rest = dataclasses.replace(config, val_path=None) if is_gone else config
            files = self._replace(config=rest)._files
            found += _changes(noted, config.path, lambda: files().train, report)
        where = config.val_path or config.path
        if "val" in noted and where is not None:
            own = self._val_files if config.val_path else lambda: self._files().val
            told = report if config.val_path else _quiet
            found += _changes(noted["val"], where, own, told)
        return origin.in_words(found)

    def _files(self, report: Report = _quiet) -> "Files":
        """The files of both sides; says what is passed over.

        Raises:
            ValueError: both sides have one.
        """
        config = self.config
        if config.path is None:
            is_divided = config.val_path is not None
            return Files(None, self._val_files(report) if is_divided else None)
        path, kind = Path(config.path), kind_of(config.source)
        train: Iterable[Path] = [path]
        if kind == "code" or kind in SUFFIXES:
            selection = config.languages, config.licenses
            train = local_files(config.source, path, report, *selection)
        val = None if config.val_path is None else self._val_files(report)
        if kind in SUFFIXES and path.is_dir():
            named = by_name([*train], path)
            tell(named, val, path, report)
            train, val = named.train, (named.val or None) if val is None else val
        if config.val_path is not None:
            train = apart(train, val or [], path, Path(config.val_path), report)
        return Files(train, val)

    def _documents(
        self,
        files: Iterable[Path] | None,
        report: Report = _quiet,
        opened: origin.Opened | None = None,
    ) -> Iterator[str]:
        config = self.config
        bounds = config.max_bytes, report, config.languages, config.licenses
        return iter_documents(config.source, config.path, *bounds, opened, files)

    def _val_documents(
        self,
        files: Iterable[Path],
        report: Report = _quiet,
        opened: origin.Opened | None = None,
    ) -> Iterator[str]:
        source, path = self.config.source, self.config.path
        if self.config.val_path is not None:
            source, path = self._val_source(), self.config.val_path
        return iter_documents(source, path, None, report, None, None, opened, files)

    def _val_files(self, report: Report = _quiet) -> list[Path]:
        path = Path(self.config.val_path or "")
        selection = self.config.languages, self.config.licenses
        return [*local_files(self._val_source(), path, report, *selection)]

    def _val_source(self) -> Source:
        """A folder beside training on code is code; a table beside text is text, since
        the training's source says so; else as it looks.
        """
        path = Path(self.config.val_path or "")
        if self.config.source == "text" and suffix_of(path) in TABLES:
            return "text"
        is_code = kind_of(self.config.source) == "code" and path.is_dir()
        return "code" if is_code else infer_source(path)


class Files(NamedTuple):
    """The local files of both sides.

    Attributes:
        train: None where the source has no files of its own.
        val: None where a share of the text is validation.
    """

    train: Iterable[Path] | None
    val: list[Path] | None


def corpus_of(config: DataConfig) -> Corpus:
    """The text of a config."""
    return Corpus(config, origin.Opened(), origin.Opened())


def _changes(
    noted: dict[str, Any],
    where: str,
    files: Callable[[], Iterable[Path] | None],
    report: Report,
) -> list[str]:
    path = Path(where)
    if not noted["files"]:
        return []
    if not path.exists():
        report(f"{path} is not there any more; the store holds its tokens")
        return []
    try:
        return origin.changes(noted, path, files() or [])
    except ValueError as error:
        return [str(error).rstrip(".")]
