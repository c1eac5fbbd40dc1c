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


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_a_page_links_to_exists(page):
    links = re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', page.read_text())
    targets = [target for pair in links for target in pair if target and "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]
