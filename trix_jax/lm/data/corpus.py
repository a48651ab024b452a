"""The text that a config names, as often as it is asked for, and what it was when a
store was made of it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trix_jax.lm.data import origin, splits
from trix_jax.lm.data.config import DataConfig
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
    """Text to divide or, with `val_path`, text to train on and text to validate on."""

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
        documents = self._documents(report, self.opened)
        if config.val_path is None:
            found = splits.survey(documents, config.val_fraction, with_characters)
        else:
            val = self._val_documents(report, self.val_opened)
            found = splits.survey_two(documents, val, with_characters)
            if not found.val_documents:
                raise ValueError(f"val_path={config.val_path!r} holds no text.")
        if not found.documents:
            raise ValueError(
                f"source={config.source!r} at path={config.path!r} holds no text."
            )
        splits.tell_cut(found, report)
        return found

    def sides(self, survey: splits.Survey) -> Iterator[tuple[str, str]]:
        """Yields `("train" | "val", text)`, in the same order every time."""
        documents = self._documents()
        if self.config.val_path is None:
            yield from splits.sides(documents, survey, self.config.val_fraction)
            return
        yield from (("train", text) for text in documents)
        yield from (("val", text) for text in self._val_documents())

    def side(self, name: str, survey: splits.Survey) -> Iterator[str]:
        """Yields the texts of one side."""
        return (text for side, text in self.sides(survey) if side == name)

    def describe(self) -> str:
        """One line on what it is, without this machine's folders."""
        said = describe(self.config.source, self.config.path)
        val = self.config.val_path
        return f"{said}; validation from {Path(val).name}" if val else said

    def note(self) -> dict[str, Any]:
        """What the manifest says of its files."""
        config = self.config
        noted = origin.note(self.opened, Path(config.path or ""))
        if config.val_path is None:
            return noted
        return noted | {"val": origin.note(self.val_opened, Path(config.val_path))}

    def changes(self, manifest: dict[str, Any], report: Report) -> str:
        """How it differs from what a store was made from, or nothing. A source that is
        gone is as it was.
        """
        config, now = self.config, self.describe()
        noted = manifest.get("sources", {"files": []})
        found = []
        if config.path is None and now != manifest["source"]:
            found.append(f"{manifest['source']}, now {now}")
        selection = config.languages, config.licenses
        if config.path is not None:
            found += _changes(noted, config.source, config.path, report, *selection)
        if config.val_path is not None and "val" in noted:
            where = self._val_source(), config.val_path, report
            found += _changes(noted["val"], *where, *selection)
        return origin.in_words(found)

    def _documents(
        self, report: Report = _quiet, opened: origin.Opened | None = None
    ) -> Iterator[str]:
        config = self.config
        bounds = config.max_bytes, report, config.languages, config.licenses
        return iter_documents(config.source, config.path, *bounds, opened)

    def _val_documents(
        self, report: Report = _quiet, opened: origin.Opened | None = None
    ) -> Iterator[str]:
        config = self.config
        path, selection = config.val_path, (config.languages, config.licenses)
        assert path is not None
        source = self._val_source() or infer_source(path)
        return iter_documents(source, path, None, report, *selection, opened)

    def _val_source(self) -> Source | None:
        """A folder beside training on code is code; None: as it looks."""
        is_code = kind_of(self.config.source) == "code"
        return "code" if is_code and Path(self.config.val_path or "").is_dir() else None


def corpus_of(config: DataConfig) -> Corpus:
    """The text of a config."""
    return Corpus(config, origin.Opened(), origin.Opened())


def _changes(
    noted: dict[str, Any],
    source: str | None,
    where: str,
    report: Report,
    *selection: str | None,
) -> list[str]:
    path = Path(where)
    if not noted["files"]:
        return []
    if not path.exists():
        report(f"{path} is not there any more; the store holds its tokens")
        return []
    try:
        files = local_files(source or infer_source(path), path, _quiet, *selection)
        return origin.changes(noted, path, files)
    except ValueError as error:
        return [str(error).rstrip(".")]
