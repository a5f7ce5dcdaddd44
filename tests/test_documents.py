"""What the documents name exists: files, links, rooms, examples; the README is short, and figures have commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, EXAMPLES = ROOT / "peft_fusion", ROOT / "examples"
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
documents = pytest.mark.parametrize("name", PAGES)
COMMAND = re.compile(r"`(?:python (?:examples|benchmarks)/|peft-fusion )")

WANTED = {
    "my model is not supported": "exclude_modules",
    "it does not fit in memory": "ffns_per_pass",
    "the result does not load in vLLM": "trust_remote_code",
    "accuracy dropped": "calibrate",
    "combine with LoRA": "set_adapter",
    "which layers": "layers_to_transform",
}
"""What people look for -> a word of the answer."""


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = (heading.strip("# ").lower() for heading in re.findall(r"^#+ .*", without_code(text), re.M))
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings}


def links(name: str) -> list[tuple[Path, str]]:
    """A page's links within the repository: the file that each leads to, and the anchor in it."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(read(name)))
    parts = [link.partition("#") for link in found if "://" not in link]
    page = ROOT / name
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


@documents
def test_links_lead_somewhere(name):
    dead = [str(path) for path, _ in links(name) if not path.exists()]
    lost = [
        f"{path}#{a}" for path, a in links(name) if a and path.is_file() and a not in anchors(path.read_text("utf-8"))
    ]
    assert dead + lost == []


@documents
def test_files_that_are_named_exist(name):
    files = re.findall(r"(?:\w+/)+\w+\.py\b", read(name))
    assert [file for file in files if not any((root / file).is_file() for root in (ROOT, PACKAGE, EXAMPLES))] == []


def test_every_page_is_in_the_contents():
    contents = set(re.findall(r"^((?:\w+/)?\w+)$", read("docs/index.md"), re.M))
    pages = {path.relative_to(ROOT / "docs").with_suffix("") for kind in ("md", "ipynb") for path in _pages(kind)}
    assert {str(page) for page in pages} - {"index"} == contents


def _pages(kind: str) -> list[Path]:
    return [path for path in (ROOT / "docs").rglob(f"*.{kind}") if ".ipynb_checkpoints" not in path.parts]


def test_the_readme_is_read_in_five_minutes():
    assert len(read("README.md").split()) <= 900


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_number_of_model_types_is_that_of_the_list(page):
    counts = [int(count) for count in re.findall(r"^\|.*\| (\d+) \|$", read("docs/model_types.md"), re.M)]
    (told,) = re.findall(r"(\d{3}) of (?:transformers' )?(\d{3})\b", read(page))
    assert told == (str(counts[0]), str(sum(counts)))


@pytest.mark.parametrize("wanted", WANTED)
def test_what_people_look_for_is_found_in_two_clicks(wanted):
    """The README has the words that one would look for, beside a link to a page that has the answer."""
    lines = [line for line in read("README.md").splitlines() if wanted.lower() in line.lower() and "](" in line]
    pages = [re.match(r"[^#]+", link)[0] for line in lines for link in re.findall(r"\]\(([^)]+)\)", line)]
    assert any(WANTED[wanted] in read(page) for page in pages)


def test_no_figures_without_their_command():
    """Every section of the results that has a table of figures names the command that made it."""
    sections = re.split(r"^#{2,3} ", read("docs/results.md"), flags=re.M)
    figures = [part for part in sections if re.search(r"^\|.*\d", part, re.M)]
    assert len(figures) > 5
    assert [part.splitlines()[0] for part in figures if not COMMAND.search(part)] == []


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "results").glob("*.json")), ids=lambda file: file.name)
def test_what_is_drawn_has_its_command(file):
    panels = json.loads(file.read_text(encoding="utf-8"))["panels"]
    drawn = [one for panel in panels for kind in ("lines", "points", "bars") for one in panel.get(kind, ())]
    assert len(drawn) >= len(panels) > 0
    assert [one["label"] for one in drawn if not (ROOT / one["command"].split()[1]).is_file()] == []


def test_the_rooms_are_those_of_the_package():
    tree = read("CONTRIBUTING.md").split("\npeft_fusion/\n")[1].split("```")[0]
    rooms = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
    named = re.findall(r"(\w+)/", "\n".join(re.split(r"\s{3,}", line.strip())[0] for line in tree.splitlines()))
    assert sorted(named) == sorted(rooms)


def test_the_list_of_examples_is_complete():
    text = read("examples/README.md")
    owners = tuple(re.findall(r"`(\w+_)\*`", text))
    helpers = [path.stem for path in (EXAMPLES / "common").glob("*.py") if not path.stem.startswith((*owners, "_"))]
    assert [script.name for script in EXAMPLES.glob("*.py") if f"({script.name})" not in text] == []
    assert [helper for helper in helpers if f"`{helper}`" not in text] == []
