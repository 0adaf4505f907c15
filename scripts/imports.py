"""Fails on an import cycle between files of the package, and on a path that leads from a file into another folder.

``lint-imports`` checks the layers of packages; this checks single files, and what no import shows: a file finds its
data in its own folder or in ``llm_accel.assets``, never by climbing into the folders of other packages.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "llm_accel"
TYPES_ALONE = "llm_accel.patches."  # its files may name each other's types; nothing else may, and at run time none


def cycles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules each of which reaches the others, sorted (Tarjan's components)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for target in imports.get(module, ()):
            if target not in order:
                visit(target)
            if target in stack:
                lowest[module] = min(lowest[module], lowest[target])
        if lowest[module] == order[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in imports:
        if module not in order:
            visit(module)
    return sorted(found)


def climbs(source: str) -> Iterator[int]:
    """Lines on which ``__file__`` leads further up than the file's own folder, or ``importlib.resources`` is used."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            if any(name.startswith("importlib.resources") for name in names):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and node.attr in ("parent", "parents"):
            inside = [part for part in ast.walk(node.value) if isinstance(part, ast.Name | ast.Attribute)]
            named = {part.id if isinstance(part, ast.Name) else part.attr for part in inside}
            if "__file__" in named and (node.attr == "parents" or "parent" in named):
                yield node.lineno


def graph(types: bool) -> dict[str, set[str]]:
    """Every module of the package with those it imports, inside functions too; ``types``: for annotations too."""
    built = grimp.build_graph(PACKAGE, exclude_type_checking_imports=not types)
    return {module: built.find_modules_directly_imported_by(module) for module in sorted(built.modules)}


def main() -> int:
    """Prints every cycle and every such path; 1 when there is one."""
    imports = graph(types=True)
    found = cycles(graph(types=False))
    found += [one for one in cycles(imports) if not all(name.startswith(TYPES_ALONE) for name in one)]
    for cycle in found:
        print(f"import cycle: {' <-> '.join(cycle)}", file=sys.stderr)
    paths = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / PACKAGE).rglob("*.py"))
        for line in climbs(file.read_text(encoding="utf-8"))
    ]
    for path in paths:
        print(f"{path}: a path into another folder; put the file into llm_accel/assets", file=sys.stderr)
    edges = sum(map(len, imports.values()))
    print(f"{len(imports)} modules, {edges} imports, {len(found)} cycles, {len(paths)} paths into other folders")
    return int(bool(found or paths))


if __name__ == "__main__":
    sys.exit(main())
