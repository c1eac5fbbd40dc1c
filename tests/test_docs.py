"""The pages: they quote docs/tables as printed, and what they show and link to exists."""
import re

import pytest
from conftest import REPOSITORY

import benchmark

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
TABLES = sorted((REPOSITORY / "docs/tables").glob("*.md"))


@pytest.mark.parametrize("table", TABLES, ids=lambda path: path.stem)
def test_measurements_quote_the_table_as_it_was_printed(table):
    assert table.read_text().strip() in (REPOSITORY / "docs/measurements.md").read_text()


@pytest.mark.parametrize("name", list(benchmark.OF_RUNS))
def test_tables_of_runs_are_of_all_runs_in_the_file(name, capsys):
    benchmark.main([name])
    assert capsys.readouterr().out == (REPOSITORY / f"docs/tables/{name}.md").read_text()


def anchors(page):
    """The names by which GitHub knows a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_exists(page):
    links = re.findall(r"\]\(\s*([^)\s]+)\s*\)", page.read_text())
    links += re.findall(r'src="([^"]+)"', page.read_text())
    for link in links:
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
