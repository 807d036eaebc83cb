"""``docs/families.md`` says what the tables say, and nothing else."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_is_what_the_tables_give():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "generate_families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "families.md").read_text(encoding="utf-8")
    assert module.page() == page, "run: python docs/generate_families.py > docs/families.md"
