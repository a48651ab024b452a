"""A corpus that changed after it was prepared: told, refused, or prepared again."""

import dataclasses
import json
import shutil

import pytest

from trix_jax.cli import main
from trix_jax.lm.data import DataConfig, open_store, prepare
from trix_jax.lm.train.run import open_data

pytestmark = pytest.mark.usefixtures("no_type_hook")


def quiet(line):
    pass


@pytest.fixture
def corpus_folder(tmp_path):
    folder = tmp_path / "corpus"
    for i in range(30):
        path = folder / f"{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {i} has these words\n" * 5)
    return folder


@pytest.fixture
def config(corpus_folder):
    return DataConfig(source="text", path=str(corpus_folder))


def test_manifest_has_name_size_and_hash_of_every_file(config, tmp_path):
    store = prepare(config, tmp_path / "store", quiet)
    noted = store.manifest["sources"]
    assert noted["complete"] is True
    assert [entry["name"] for entry in noted["files"][:2]] == ["0/00.txt", "0/03.txt"]
    assert len(noted["files"]) == 30
    assert noted["files"][0] == {
        "name": "0/00.txt",
        "bytes": 115,
        # sha256sum of the file
        "sha256": "10b3b46b497245f1726cdd0988a4ef91aded9a01c66e552648af302c67d843b9",
    }


CHANGES = {
    "0/00.txt changed": lambda f: (f / "0/00.txt").write_text(
        "fIle 0 has these words\n" * 5
    ),
    "1/01.txt changed": lambda f: (f / "1/01.txt").write_text("longer " * 99),
    "2/02.txt is gone": lambda f: (f / "2/02.txt").unlink(),
    "2/99.TXT is new": lambda f: (f / "2/99.TXT").write_text("new text"),
}


@pytest.mark.parametrize("said", CHANGES)
def test_changed_corpus_is_refused_by_prepare_and_rebuilt_when_asked(
    said, config, corpus_folder, tmp_path, capsys
):
    place = tmp_path / "store"
    before = prepare(config, place, quiet).fingerprint
    CHANGES[said](corpus_folder)
    argv = ["prepare", "--workdir", str(place), "--data.path", str(corpus_folder)]
    assert main(argv) == 2
    assert f"than there is now: {said}." in capsys.readouterr().err
    assert open_store(place).fingerprint == before
    assert main([*argv, "--rebuild", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    fresh = prepare(config, tmp_path / "fresh", quiet)
    assert result["fingerprint"] == fresh.fingerprint != before
    assert result["train_tokens"] == len(fresh.train)
    assert result["val_tokens"] == len(fresh.val)
    assert main(argv) == 0


def test_the_same_text_elsewhere_is_the_same_and_other_text_is_not(
    config, corpus_folder, tmp_path, monkeypatch
):
    before = prepare(config, tmp_path / "store", quiet).fingerprint
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(corpus_folder, tmp_path / "moved")
    for path in ("corpus", f"./{corpus_folder.name}", str(moved)):
        again = dataclasses.replace(config, path=path)
        assert prepare(again, tmp_path / "store", quiet).fingerprint == before
    own = dataclasses.replace(config, source="stdlib", path=None, max_bytes=20_000)
    prepare(own, tmp_path / "library", quiet)
    with pytest.raises(ValueError, match=r"store of another config: .*path=None there"):
        prepare(dataclasses.replace(own, path="moved"), tmp_path / "library", quiet)
    (moved / "0" / "00.txt").write_text("something else\n")
    for path in ("moved", "nowhere"):
        with pytest.raises(ValueError, match="store of another config: path="):
            prepare(dataclasses.replace(config, path=path), tmp_path / "store", quiet)


@pytest.mark.parametrize("said", CHANGES)
def test_run_that_goes_on_is_told_and_keeps_its_tokens(
    said, config, corpus_folder, tmp_path, tiny_config
):
    run, lines = dataclasses.replace(tiny_config, data=config), []
    before = open_data(run, tmp_path, quiet).fingerprint
    CHANGES[said](corpus_folder)
    store = open_data(run, tmp_path, lines.append, is_new=False)
    assert store.fingerprint == before
    assert [line for line in lines if f"now: {said}. It is used as it is" in line]
    with pytest.raises(ValueError, match="prepared from other text"):
        open_data(run, tmp_path, quiet)


@pytest.mark.parametrize("source", ["stdlib", "jsonl"])
def test_source_that_is_gone_blocks_nothing(source, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = (json.dumps({"text": f"text {i}"}) + "\n" for i in range(30))
    (folder / "a.jsonl").write_text("".join(texts))
    config = DataConfig(source=source, path=str(folder))
    before = prepare(config, tmp_path / "store", quiet).fingerprint
    folder.rename(tmp_path / "elsewhere")
    lines = []
    assert prepare(config, tmp_path / "store", lines.append).fingerprint == before
    assert [line for line in lines if "is not there any more" in line]


def test_files_behind_max_bytes_are_none_of_the_store(config, corpus_folder, tmp_path):
    config = dataclasses.replace(config, max_bytes=1000)
    store = prepare(config, tmp_path / "store", quiet)
    assert store.manifest["sources"]["complete"] is False
    assert len(store.manifest["sources"]["files"]) == 9
    (corpus_folder / "2/29.txt").write_text("changed")
    (corpus_folder / "2/99.txt").write_text("new")
    assert prepare(config, tmp_path / "store", quiet).fingerprint == store.fingerprint
    (corpus_folder / "0/01.txt").write_text("new, and before the others")
    with pytest.raises(ValueError, match="is new"):
        prepare(config, tmp_path / "store", quiet)


def test_store_of_an_older_version_has_no_sources_and_opens(
    config, corpus_folder, tmp_path
):
    from trix_jax.files import json_sha256
    from trix_jax.lm.data.store import COMPACT

    store = prepare(config, tmp_path / "store", quiet)
    manifest = dict(store.manifest)
    del manifest["sources"], manifest["checksum"]
    manifest["checksum"] = json_sha256(manifest, COMPACT)
    (store.directory / "manifest.json").write_text(json.dumps(manifest))
    (corpus_folder / "0/00.txt").write_text("changed")
    again = prepare(config, tmp_path / "store", quiet)
    assert again.fingerprint == store.fingerprint


def test_corpus_that_changes_while_it_is_read_is_refused(
    config, corpus_folder, tmp_path
):
    def report(line):
        if "indexing" in line:  # after the first reading
            (corpus_folder / "0/00.txt").write_text("other text")

    config = dataclasses.replace(config, near_duplicates=0.5)
    with pytest.raises(ValueError, match=r"0/00\.txt changed while it was read"):
        prepare(config, tmp_path / "store", report)
    assert not (tmp_path / "store").exists()
