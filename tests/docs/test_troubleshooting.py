"""Every error and warning of the package has its line in the list of them, and every line its error or warning."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import peft_fusion

PACKAGE = Path(peft_fusion.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
FILLED = "…"
"""What stands for what is filled in, in a message as in the list."""

FOR_PYTHON = {"NotImplementedError", "KeyError", "AttributeError", "StopIteration"}
"""Raised to speak with Python, not with people."""

TELLING = 5
"""Letters of its own that a line of the list needs to stand for messages that are not word for word the same."""


def messages(package: Path) -> dict[str, str]:
    """Every message of an error or warning in a package's sources -> where it is."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}
    names = {name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)}
    for tree in trees.values():
        classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        names |= {c.name for c in classes if any(ast.unparse(base) in names for base in c.bases)}
    names = names - FOR_PYTHON | {"warn", "warning", "warning_once", "BadParameter"}
    return {
        text_of(node.args[0]): f"{path.relative_to(package)}:{node.lineno}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).rpartition(".")[2] in names
    }


def text_of(node: ast.expr) -> str:
    """A message as far as the source states it."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    return FILLED


def listed(page: str) -> list[str]:
    """The messages of the list: the first cells of its tables, where they are code."""
    return [message for _, message in re.findall(r"^\| (`+) ?(.+?) ?\1 \|", page, re.M)]


def stands_for(line: str, message: str) -> bool:
    if len(re.sub(r"\W", "", line)) < TELLING:
        return line == message
    return bool(re.fullmatch(".*".join(map(re.escape, line.split(FILLED))), message, re.DOTALL))


def missing(package: Path, page: str) -> list[str]:
    lines = listed(page)
    found = messages(package)
    return [f"{where}: {text}" for text, where in found.items() if not any(stands_for(line, text) for line in lines)]


def test_every_message_is_listed():
    """What this prints is to be given a line in `docs/troubleshooting.md`, in the section where one would look."""
    assert missing(PACKAGE, PAGE.read_text(encoding="utf-8")) == []


def test_what_is_listed_is_said():
    found = messages(PACKAGE)
    lines = listed(PAGE.read_text(encoding="utf-8"))
    assert [line for line in lines if not any(stands_for(line, text) for text in found)] == []
    assert len(set(lines)) == len(lines) > 150


def test_a_new_error_and_a_changed_one_are_noticed(tmp_path):
    (tmp_path / "new.py").write_text(
        "class Odd(ValueError):\n    pass\n"
        "def f(x):\n    raise Odd(f'{x} is odd: ' + 'halve it.')\n"
        "def g(x):\n    warnings.warn(f'`{x}` is rounded up.')\n    raise KeyError(x)\n"
    )
    assert set(messages(tmp_path)) == {"… is odd: halve it.", "`…` is rounded up."}
    page = "| message | cure |\n|---|---|\n| ``… is odd: …`` | halve |\n"
    assert missing(tmp_path, page) == ["new.py:6: `…` is rounded up."]
    assert missing(tmp_path, page.replace("odd: …", "odd: double it.")) != missing(tmp_path, page)
