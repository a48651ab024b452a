"""The tables of the front page and of the results page are those of the committed
results.
"""

from experiments import front_page


def test_tables_are_those_of_the_committed_results():
    for path in front_page.PAGES:
        page = path.read_text("utf-8")
        assert "<!-- front page: comparison -->" in page
        assert front_page.filled(page) == page, "run python -m experiments.front_page"


def test_changed_result_changes_the_page(tmp_path, monkeypatch):
    for path in front_page.RESULTS.glob("*.json"):
        text = path.read_text("utf-8").replace("3.630377952150859", "3.930377952150859")
        (tmp_path / path.name).write_text(text)
    monkeypatch.setattr(front_page, "RESULTS", tmp_path)
    readme = front_page.PAGES[0].read_text("utf-8")
    assert front_page.filled(readme) != readme
