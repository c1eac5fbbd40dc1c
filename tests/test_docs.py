"""The pages: they quote docs/tables as printed, their code runs, what they link to exists."""
import re
import statistics

import pytest
from conftest import REPOSITORY, read_csv

import benchmark
from runs import read_runs, rows_of

README = (REPOSITORY / "README.md").read_text()
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TABLES = sorted((REPOSITORY / "docs/tables").glob("*.md"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_measurements_quote_the_table_as_it_was_printed(table):
    assert table.read_text().strip() in (REPOSITORY / "docs/measurements.md").read_text()


@pytest.mark.parametrize("name", [name for name in benchmark.OF_RUNS
                                  if (REPOSITORY / f"docs/tables/{name}.md").exists()])
def test_tables_of_runs_are_of_all_runs_in_the_file(name, capsys):
    benchmark.main([name])
    assert capsys.readouterr().out == (REPOSITORY / f"docs/tables/{name}.md").read_text()


def test_the_readme_quotes_the_textbook_and_its_other_code_runs(tmp_path, monkeypatch):
    def without_indent(text):
        return re.sub(r"^ +", "", text, flags=re.MULTILINE)

    textbook = without_indent((REPOSITORY / "docs/textbook.py").read_text())
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    other = [block for block in blocks if without_indent(block) not in textbook]
    assert len(blocks) == 4 and len(other) == 1
    for name in ("src", "checkpoints"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(other[0], names)
    assert names["images"].shape == (25, 1, 28, 28)
    assert len(list(tmp_path.glob("generated_samples/*.png"))) == 1


@pytest.mark.parametrize("name, epochs",
                         [("E", 4), ("recipe", 1), ("E", 8), ("recipe", 4), ("E", 16),
                          ("recipe", 16)])
def test_the_readmes_first_table_is_of_the_runs(name, epochs):
    rows = rows_of(read_runs(), name, epochs)
    accuracy, distance = (statistics.mean(row[column] for row in rows)
                          for column in ("accuracy", "fid_classifier"))
    recipe, baseline = re.findall(r"([\d,]+) images/s",
                                 (REPOSITORY / "docs/tables/training.md").read_text())
    images_per_second = int((baseline if name == "E" else recipe).replace(",", ""))
    minutes = epochs * 60_000 / images_per_second / 60
    what = "baseline E" if name == "E" else name
    epochs = "1 epoch" if epochs == 1 else f"{epochs} epochs"
    assert (f"| {what} | {epochs}, {minutes:.0f} min | {100 * accuracy:.1f} % | {distance:.3f} |"
            in README)


def mean_distance(name, epochs):
    return statistics.mean(row["fid_classifier"] for row in rows_of(read_runs(), name, epochs))


def test_few_epochs_come_closer_than_more_of_the_baseline_but_not_in_the_end():
    assert mean_distance("recipe", 1) < mean_distance("E", 4)
    assert mean_distance("recipe", 4) < mean_distance("E", 8)
    assert mean_distance("recipe", 16) >= mean_distance("E", 16)


@pytest.mark.parametrize("name, words", [
    ("recipe", "with all of them it is"), ("uniform_t", "nearly uniform:"),
    ("no_guidance", "to the target. *Without any guidance:"), ("no_muon", "*With Adam alone:"),
    ("no_decay", "over the run. *Without:")])
def test_the_readme_says_what_each_choice_is_worth(name, words):
    assert f"{words} {mean_distance(name, 2):.3f}." in " ".join(README.split())


def test_the_readme_quotes_the_released_weights():
    *_, last = rows = read_csv(REPOSITORY / "datas/released_metrics.csv")
    rows = [row for row in rows if row["epoch"] == last["epoch"]]
    for name, form in (("accuracy", ".2%"), ("fid_classifier", ".4f")):
        quoted = benchmark.with_deviation([float(row[name]) for row in rows], form)
        assert quoted.replace("%", " %") in README


def anchors(page):
    """The names by which GitHub knows a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_exists(page):
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", page.read_text())
    links += re.findall(r'src(?:set)?="([^"]+)"', page.read_text())
    for link in links:
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
