"""The walls between the rooms of the package, read off its sources; `test_walls.py` holds them.

Every check takes the folder of the package and returns its violations in words, each with its file and line.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from peft_fusion.ffn import LAYOUTS

PACKAGE = "peft_fusion"
VERBS = ("calibrate", "tune", "fidelity", "distill", "export")
BELOW = ("fusing", "ffn", "tuner", "observe", "progress")
ALLOWED: dict[str, tuple[str, ...]] = {
    "progress": (),
    "fusing": (),
    "ffn": ("fusing", "progress"),
    "tuner": ("ffn", "fusing", "progress"),
    "observe": ("tuner", "ffn", "fusing", "progress"),
    **dict.fromkeys(VERBS, BELOW),
    "cli": (*BELOW, *VERBS),
    "": (*BELOW, *VERBS, "cli"),  # the package's own `__init__.py`
}
"""Room -> the rooms that it may import."""

AT_THE_ROOT = {"__init__.py", "progress.py", "cli.py", "py.typed"}

HOOK = re.compile(
    r"register_(module_)?(full_)?(forward|backward)(_pre)?_hook|register_(post_accumulate_grad_|multi_grad_)?hook"
)
MUTATES = "add append clear discard extend insert pop popitem register remove setdefault sort update".split()  # noqa: SIM905

TOO_COMMON = {"ffn", "intermediate", "output"}  # as words for other things; ALBERT's and ProphetNet's
NAMES = {path for layout in LAYOUTS for path in (*layout.in_projections, layout.out_projection)} - TOO_COMMON
PROJECTION = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, sorted(NAMES)))})(?!\w)")


@dataclass(frozen=True)
class Source:
    """One file: its dotted name below the package ("" for the package itself), and what it says."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def room(self) -> str:
        return _top(self.name)

    @property
    def package(self) -> str:
        """What its relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def at(self, node: ast.AST, what: str) -> str:
        return f"{self.name.replace('.', '/') or PACKAGE}:{getattr(node, 'lineno', 0)} {what}"


def sources(root: Path) -> dict[str, Source]:
    """Every file of a package by its dotted name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        found[name] = Source(name, path, _parsed(path.read_text(encoding="utf-8")))
    return found


_parsed = lru_cache(maxsize=None)(ast.parse)


@cache
def _nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """Every node of a file; every check asks, of files of which nearly all stay the same."""
    return tuple(ast.walk(tree))


def imports(source: Source, known: dict[str, Source]) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every import of a file, in functions too: where, of what, and whether of the package (its dotted name then)."""
    for node in _nodes(source.tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = source.package.split(".") if source.package else []
            start = [PACKAGE, *parts[: len(parts) + 1 - node.level]] if node.level else []
            target = ".".join([*start, *filter(None, [node.module])])
            names = [f"{target}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix(f"{PACKAGE}.") in known else target for name in names]
        for name in names:
            own = name == PACKAGE or name.startswith(f"{PACKAGE}.")
            yield node, name.removeprefix(PACKAGE).removeprefix(".") if own else name, own


def _top(name: str | None) -> str:
    return (name or "").split(".")[0]


def rooms(root: Path) -> list[str]:
    """Imports go downward only, and `fusing` knows torch alone."""
    found, known = [], sources(root)
    for source in known.values():
        for node, target, own in imports(source, known):
            top = _top(target)
            if own and top != source.room and top not in ALLOWED.get(source.room, ()):
                found.append(source.at(node, f"imports {top or PACKAGE}"))
            if not own and source.room == "fusing" and top not in {"torch", *sys.stdlib_module_names}:
                found.append(source.at(node, f"imports {top}"))
    return found


def circles(root: Path) -> list[str]:
    """No module is imported, by whatever way, by what it imports itself."""
    known = sources(root)
    edges = {name: _leads_to(source, known) for name, source in known.items()}
    reached: dict[str, set[str]] = {}
    for name in edges:
        found, new = set[str](), set(edges[name])
        while new:
            found |= new
            new = set().union(*(edges[one] for one in new)) - found
        reached[name] = found
    return [f"{a} imports {b}, which leads back" for a in edges for b in sorted(edges[a]) if a == b or a in reached[b]]


def _leads_to(source: Source, known: dict[str, Source]) -> set[str]:
    """What is run by importing a module: its imports, and the packages in which these lie; not those it lies in."""
    found = set()
    for _, target, own in imports(source, known):
        if own and target in known:
            found.add(target)
            outer = target.rpartition(".")[0]
            while outer and not f"{source.name}.".startswith(f"{outer}."):
                found.add(outer)
                outer = outer.rpartition(".")[0]
    return found


def hooks(root: Path) -> list[str]:
    """Only `ffn` and `observe` register hooks."""
    return [
        source.at(node, f"uses {name}")
        for source in sources(root).values()
        if source.room not in ("ffn", "observe")
        for node, name in _names(source.tree)
        if HOOK.fullmatch(name)
    ]


def projections(root: Path) -> list[str]:
    """Only `ffn` knows what projections are called."""
    found = []
    for source in sources(root).values():
        if source.room == "ffn":
            continue
        docs = {id(node.value) for node in _nodes(source.tree) if isinstance(node, ast.Expr)}
        for node, name in _names(source.tree):
            if id(node) not in docs and (name in ("in_projections", "out_projection") or PROJECTION.search(name)):
                found.append(source.at(node, f"uses {name!r}"))
    return found


@cache
def _names(tree: ast.Module) -> tuple[tuple[ast.AST, str], ...]:
    """Every name that a file uses, as a name, an attribute, an argument or a string."""
    return tuple(
        (node, name)
        for node in _nodes(tree)
        for attribute in ("id", "attr", "arg", "value", "name")
        if isinstance(name := getattr(node, attribute, None), str)
    )


def globals_of_others(root: Path) -> list[str]:
    """Only `tuner/registration.py` changes what belongs to PEFT or transformers."""
    found = []
    for source in sources(root).values():
        if source.name == "tuner.registration":
            continue
        theirs = _names_of_others(source.tree)
        for node in _nodes(source.tree):
            if any(_root(target) in theirs for target in _changed(node)):
                found.append(source.at(node, f"changes {ast.unparse(node)}"))
    return found


def _names_of_others(tree: ast.Module) -> set[str]:
    """The names that stand for something of PEFT's or transformers', imported or assigned from there."""
    theirs = set()
    for node in _nodes(tree):
        if isinstance(node, ast.Import):
            tops = {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names}
            theirs |= {name for name, full in tops.items() if _top(full) in ("peft", "transformers")}
        elif isinstance(node, ast.ImportFrom) and not node.level and _top(node.module) in ("peft", "transformers"):
            theirs |= {alias.asname or alias.name for alias in node.names}
    for node in _nodes(tree):
        if isinstance(node, ast.Assign) and _root(node.value) in theirs:
            theirs |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return theirs


def _changed(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns to, deletes or mutates; a plain name that gets another value is not changed."""
    targets: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = [leaf for target in node.targets for leaf in getattr(target, "elts", [target])]
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("setattr", "delattr", "__setattr__", "register_peft_method"):
            return [*node.args[:1], node.func]
        return [node.func.value] if isinstance(node.func, ast.Attribute) and name in MUTATES else []
    return [target for target in targets if not isinstance(target, ast.Name)]


def _root(node: ast.AST) -> str:
    """The name that a chain of attributes, items and `getattr` or `vars` starts from."""
    while not isinstance(node, ast.Name):
        if isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred)):
            node = node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "vars") and node.args:
            node = node.args[0]
        else:
            return ""
    return node.id


def at_the_root(root: Path) -> list[str]:
    """Nothing at the package's root but the rooms and a few files."""
    return [
        f"{path.name} at the root"
        for path in sorted(root.iterdir())
        if path.name not in AT_THE_ROOT
        and (path.name not in ALLOWED or not path.is_dir())
        and path.name != "__pycache__"
    ]
