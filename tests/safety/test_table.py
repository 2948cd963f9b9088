"""docs/safety.md says how many fixtures of each kind there are; so many there are."""

from pathlib import Path

from safety_table import table


def test_the_table_in_the_docs_is_that_of_the_fixtures():
    docs = Path(__file__).parents[2] / "docs" / "safety.md"
    assert table() in docs.read_text(encoding="utf-8")
