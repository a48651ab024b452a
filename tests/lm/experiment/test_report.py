"""What a report says of an experiment: answers, figures, what is missing."""

import json

import pytest

from trix_jax.lm import ngram
from trix_jax.lm.data import DataConfig, prepare
from trix_jax.lm.experiment import report
from trix_jax.lm.experiment.hypotheses import HYPOTHESES, answer, by_arm
from trix_jax.lm.experiment.report import _headline, write_experiment_report
from trix_jax.lm.experiment.results import from_tree, result_of, to_tree
from trix_jax.lm.experiment.spec import Experiment, Spec, write_notes


@pytest.fixture
def runs_of(write_run, tmp_path):
    """Writes the runs of an arm, a seed a loss, and returns their specs."""

    def make(size, arm, losses, **more):
        pairs = enumerate(losses)
        return [
            write_run(tmp_path / "e/runs", size, arm, n, v, **more) for n, v in pairs
        ]

    return make


def test_hypotheses_are_answered_from_what_was_run(runs_of, tmp_path):
    specs = [
        *runs_of("s", "lookup", [1.5, 1.51, 1.49], train_loss=1.4),
        *runs_of("s", "dense", [2.0, 2.01, 2.0], train_loss=1.0),
        *runs_of("s", "sparse", [1.8, 1.81, 1.79]),
        *runs_of("s", "hash", [1.9, 1.91, 1.89]),
    ]
    found = by_arm([result_of(spec, tmp_path / "e/runs") for spec in specs])
    lower, special, capacity, regular = (answer(h, found) for h in HYPOTHESES)
    assert lower.startswith(
        "**Lower perplexity than a parameter-equivalent dense FFN: supported.**"
    )
    assert "s, sparse against hash: -0.1000" in special
    assert "Emergent routing specializes by input: supported" in special
    assert "undecided.** Not measured here" in capacity
    assert "regularizes: supported" in regular
    bare = [
        run._replace(arm="lookup-float", train_val_gap=run.train_val_gap + 0.25)
        for run in found["s", "lookup"]
    ]
    also = found | by_arm(bare)
    assert "s, lookup against lookup-float: -0.2500" in answer(HYPOTHESES[3], also)
    assert answer(HYPOTHESES[0], also) == lower  # a control is compared with nothing
    alone = by_arm([runs[0] for runs in found.values()])
    assert "one seed, no interval: undecided" in answer(HYPOTHESES[0], alone)


def test_an_arm_is_a_control_of_the_same_tiles_only_and_a_hash_is_no_mere_control(
    runs_of, tmp_path
):
    specs = [
        *runs_of("s", "sparse", [1.8, 1.81, 1.79]),
        *runs_of("s", "hash", [1.9, 1.91, 1.89]),
        *runs_of("s", "dense", [2.0, 2.01, 2.0]),
    ]
    results = [result_of(spec, tmp_path / "e/runs") for spec in specs]
    (hashed, *_) = [one for one in results if one.arm == "hash"]
    alike = {"params_total": hashed.params_total}
    results = [one._replace(**alike) if one.is_dense else one for one in results]
    found = by_arm(results)
    lower, special, *_ = HYPOTHESES
    assert "s, hash against dense: -0.1" in answer(lower, found)
    alone = by_arm([one for one in results if one.arm != "sparse"])
    assert "hash against dense" in answer(lower, alone)
    assert "sparse against hash" in answer(special, found)
    other = [o._replace(num_tiles=8) if o.arm == "hash" else o for o in results]
    assert "Not measured" in answer(special, by_arm(other))


def test_a_diverged_seed_decides_nothing_and_other_seeds_are_in_no_order(
    runs_of, tmp_path
):
    specs = [
        *runs_of("s", "lookup", [1.5, 1.51, 1.49]),
        *runs_of("s", "dense", [2.0, 2.01, 2.0]),
    ]
    lost = tmp_path / "e/runs" / specs[2].name
    (lost / "summary.json").unlink()
    said = "trix-jax train: loss (nan) or gradient norm (nan) is not finite at step 7, after 10 skipped in a row (train.max_skipped=10): stopped."
    (lost / "log.txt").write_text(said)
    write(tmp_path / "e", specs)
    text = write_experiment_report(tmp_path / "e", print).read_text()
    assert "dense FFN: undecided.**" in text
    assert "undecided, a seed of lookup diverged" in text
    assert "of other seeds for some arms and so in no order: lookup" in text
    runs = [result_of(one, tmp_path / "e/runs") for one in specs]
    one, two = [r for r in runs if r.is_dense], [r for r in runs if not r.is_dense]
    apart = by_arm([*two[:1], *one[1:]])
    assert "the arms that would tell share no seed" in answer(HYPOTHESES[0], apart)


def test_a_loss_that_no_perplexity_holds_is_reported(runs_of, tmp_path):
    specs = runs_of("s", "lookup", [9445.5, 9000.0])
    write(tmp_path / "e", specs)
    text = write_experiment_report(tmp_path / "e", print).read_text()
    assert "lookup 9222.7500 ±" in text


def test_losses_of_other_validation_tokens_are_not_compared(runs_of, tmp_path):
    specs = [
        *runs_of("s", "lookup", [1.8, 1.81, 1.79]),
        *runs_of("s", "hash", [1.9, 1.91, 1.89]),
        *runs_of("s", "dense", [2.0, 2.01, 2.0]),
    ]
    results = [result_of(spec, tmp_path / "e/runs") for spec in specs]
    same = {"num_tiles": 4, "tile_width": None, "tiles_per_token": 1}
    control = {"arm": "lookup-hash"} | same
    results = [
        one._replace(**(control if one.arm == "hash" else same)) for one in results
    ]
    parts = [
        one._replace(val_tokens=1024) if one.arm == "lookup" else one for one in results
    ]
    lower, special, *_ = HYPOTHESES
    assert ": supported.**" in answer(lower, by_arm(results))
    assert "lookup against lookup-hash" in answer(special, by_arm(results))
    for hypothesis in (lower, special):
        assert "undecided.** Not measured" in answer(hypothesis, by_arm(parts))
    assert "lowest first: lookup" in _headline("s", by_arm(results), {})
    said = _headline("s", by_arm(parts), {2: 2.5})
    assert "in no order: " in said
    assert "lowest" not in said


def test_hypothesis_whose_sizes_disagree_is_mixed(runs_of, tmp_path):
    specs = [
        *runs_of("s", "lookup", [1.5, 1.51, 1.49]),
        *runs_of("s", "dense", [2.0, 2.01, 2.0]),
        *runs_of("m", "lookup", [2.5, 2.51, 2.49]),
        *runs_of("m", "dense", [2.0, 2.01, 2.0]),
    ]
    found = by_arm([result_of(spec, tmp_path / "e/runs") for spec in specs])
    text = answer(HYPOTHESES[0], found)
    assert "dense FFN: mixed.**" in text
    assert "m, lookup against dense: +0.4967" in text
    assert text.endswith("not supported")


def result(val_tokens):
    tree = {"size": "s", "arm": "dense", "val_loss": 2.0, "val_tokens": val_tokens}
    return from_tree(tree)


def test_floors_are_of_the_tokens_that_the_runs_are_evaluated_on(corpus, tmp_path):
    config = DataConfig(source="text", path=str(corpus), tokenizer="char")
    store = prepare(config, tmp_path / "store", lambda _: None)
    specs, said = [Spec("e", "s", "dense", 1, 5, (), str(store.directory))], []

    def floors_of(*val_tokens):
        runs = [result(count) for count in val_tokens]
        return report._floors(tmp_path, runs, specs, said.append)

    whole, part = floors_of(None), floors_of(16, 16)
    assert whole["s"] == ngram.floors(store, report.ORDERS)
    assert part["s"] == ngram.floors(store, report.ORDERS, scored=16) != whole["s"]
    assert floors_of(16, None) == {}
    assert len(said) == 2
    store.directory.rename(tmp_path / "elsewhere")
    assert (floors_of(16), floors_of(None)) == (part, {})


def test_a_result_knows_how_much_its_evaluations_predict(runs_of, tmp_path):
    (spec,) = runs_of("s", "dense", [2.0])
    folder = tmp_path / "e/runs"
    before = to_tree(result_of(spec, folder))
    assert "val_tokens" not in before
    config, metrics = (folder / spec.name / n for n in ("config.yaml", "metrics.jsonl"))
    tree = json.loads(config.read_text())
    tree["train"]["eval_tokens"] = 30
    config.write_text(json.dumps(tree))
    lines = metrics.read_text().replace('"val_loss"', '"val_tokens": 32, "val_loss"')
    metrics.write_text(lines)
    assert to_tree(result_of(spec, folder)) == before | {"val_tokens": 32}


def test_floors_are_those_of_the_store_that_is_there(corpus, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("ab" * 4000)
    found = []
    for n, text in enumerate((corpus, corpus, other)):
        store = tmp_path / f"store-{n}"
        config = DataConfig(source="text", path=str(text), tokenizer="char")
        prepare(config, store, lambda _: None)
        said = []
        spec, runs = Spec("e", "s", "dense", 1, 5, (), str(store)), [result(None)]
        found.append(report._floors(tmp_path, runs, [spec], said.append)["s"])
        assert bool(said) == (n != 1)  # the same tokens elsewhere are not counted again
    assert found[0] == found[1]
    assert found[2][2] < 0.01 < found[0][2]


def write(directory, specs):
    missing = specs[0]._replace(seed=99)
    words = ("e", "A title", "Does it?", "Made up.")
    write_notes(Experiment(*words, [*specs, missing], {}, {}), directory)


@pytest.mark.slow
def test_report_of_a_ladder_is_made_again_where_the_runs_are_gone(runs_of, tmp_path):
    specs = [
        *runs_of("s", "lookup", [2.0, 2.1]),
        *runs_of("s", "dense", [1.9, 2.0]),
        *runs_of("m", "lookup", [1.8], size_scale=4.0),
        *runs_of("m", "dense", [1.7], size_scale=4.0),
    ]
    directory = tmp_path / "e"
    write(directory, specs)
    text = write_experiment_report(directory, lambda _: None).read_text()
    assert text.startswith("# A title\n\nDoes it?\n\n> Made up. **6 of 7 runs are fin")
    assert "missing: s/lookup/seed-99." in text
    assert "**m**, validation loss in nats per token, lowest first: dense 1.7" in text
    for name in ("costs", "s_loss", "m_loss", "m_steps", "s_lookup_routing"):
        assert (directory / "plots" / f"{name}.png").stat().st_size > 5000
    assert len(json.loads((directory / "metrics.json").read_text())) == 6
    (directory / "runs").rename(tmp_path / "elsewhere")
    assert write_experiment_report(directory, lambda _: None).read_text() == text


@pytest.mark.slow
def test_report_of_two_samplers_has_tables_and_answers_of_each_alone(runs_of, tmp_path):
    old = runs_of("s", "lookup", [2.0, 2.1]) + runs_of("s", "dense", [1.9, 2.0])
    new = runs_of("s", "sparse", [1.5, 1.6]) + runs_of("s", "hash", [1.8, 1.9])
    for spec in new:
        path = tmp_path / "e/runs" / spec.name / "config.yaml"
        tree = json.loads(path.read_text())
        tree["train"]["sampler"] = "epochs"
        path.write_text(json.dumps(tree))
    write(tmp_path / "e", [*old, *new])
    text = write_experiment_report(tmp_path / "e", lambda _: None).read_text()
    _, first, second = text.split("\n# Sampler ")
    assert first.startswith("`offsets`")
    assert second.startswith("`epochs`")
    rows = [
        [f"\n| {arm} |" in part for arm in ("lookup", "dense", "sparse", "hash")]
        for part in (first, second)
    ]
    assert rows == [[True, True, False, False], [False, False, True, True]]
    assert "lookup against dense: +0.1000" in first
    assert "sparse against hash: -0.3000" in second
    assert first.count("Sampler: `offsets`.") == second.count("Sampler: `epochs`.") == 1
    for name in ("costs_offsets", "costs_epochs", "s_epochs_loss", "s_offsets_loss"):
        assert (tmp_path / "e/plots" / f"{name}.png").is_file()


def test_report_of_nothing_finished_says_so(runs_of, tmp_path):
    write(tmp_path / "e", runs_of("s", "lookup", [2.0]))
    (tmp_path / "e/runs/s/lookup/seed-0/summary.json").unlink()
    with pytest.raises(ValueError, match=r"must hold a finished run\. Got none of 2"):
        write_experiment_report(tmp_path / "e", lambda _: None)


@pytest.mark.slow
def test_report_names_what_diverged(runs_of, tmp_path):
    specs = runs_of("s", "dense", [2.0, 2.1])
    write(tmp_path / "e", specs)
    directory = tmp_path / "e/runs" / specs[1].name
    (directory / "summary.json").unlink()
    (directory / "log.txt").write_text("validation loss (nan) is not finite: stopped")
    text = write_experiment_report(tmp_path / "e", lambda _: None).read_text()
    assert "**1 of 3 runs are finished**; missing: s/dense/seed-99;" in text
    assert "diverged: s/dense/seed-1." in text
    assert "nan" not in text
