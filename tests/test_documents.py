"""What the documents name exists: files, links, rooms, and every example and helper in the examples' list."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, EXAMPLES = ROOT / "peft_fusion", ROOT / "examples"
documents = pytest.mark.parametrize(
    "name", ["README.md", "docs/method.md", "docs/results.md", "docs/export.md", "examples/README.md"]
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@documents
def test_links_lead_somewhere(name):
    text = read(name)
    headings = [heading.strip("# ").lower() for heading in re.findall(r"^#+ .*", text, re.M)]
    anchors = {"#" + re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if link not in anchors and not ((ROOT / name).parent / link).exists()] == []


@documents
def test_files_that_are_named_exist(name):
    files = re.findall(r"(?:\w+/)+\w+\.py\b", read(name))
    assert [file for file in files if not any((root / file).is_file() for root in (ROOT, PACKAGE, EXAMPLES))] == []


def test_the_rooms_are_those_of_the_package():
    tree = read("README.md").split("\npeft_fusion/\n")[1].split("```")[0]
    rooms = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
    named = re.findall(r"(\w+)/", "\n".join(re.split(r"\s{3,}", line.strip())[0] for line in tree.splitlines()))
    assert sorted(named) == sorted(rooms)


def test_the_list_of_examples_is_complete():
    text = read("examples/README.md")
    owners = tuple(re.findall(r"`(\w+_)\*`", text))
    helpers = [path.stem for path in (EXAMPLES / "common").glob("*.py") if not path.stem.startswith((*owners, "_"))]
    assert [script.name for script in EXAMPLES.glob("*.py") if f"({script.name})" not in text] == []
    assert [helper for helper in helpers if f"`{helper}`" not in text] == []
