"""Imports of the product code: no cycles, small fan-out, relative inside a wheel, none between wheels.

Run as ``python scripts/check_cycles.py``; prints each offence and exits with 1 if there is any. Imports under
``TYPE_CHECKING`` do not count; imports inside functions do.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_FAN_OUT = 12
COMPOSITION_ROOTS = {"ds_core.build"}  # their job is to know all parts


def main() -> int:
    """Check all wheels; return the number of offences."""
    offences: list[str] = []
    num_modules = 0
    for source in sorted(ROOT.glob("packages/*/src/*/__init__.py")):
        package = source.parent
        edges = dict(_edges(package, offences))
        num_modules += len(edges)
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            offences.append(f"import cycle: {' -> '.join(error.args[1])}")
        for module, imported in edges.items():
            if len(imported) > MAX_FAN_OUT and module not in COMPOSITION_ROOTS:
                offences.append(f"{module} imports {len(imported)} modules of its wheel, at most {MAX_FAN_OUT}")
    print("\n".join(offences) or f"{num_modules} modules, no offence")
    return min(1, len(offences))


def _edges(package: Path, offences: list[str]) -> Iterator[tuple[str, set[str]]]:
    modules = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    natives = {_name(path, package) for path in package.rglob("*.pyi")}  # they import nothing of ours
    for name, path in modules.items():
        imported: set[str] = set()
        for node in _imports(ast.parse(path.read_text()).body):
            for target in _targets(node, name, path.name == "__init__.py"):
                top = target.partition(".")[0]
                if top.startswith("ds_") and not (isinstance(node, ast.ImportFrom) and node.level):
                    own = top == package.name
                    offences.append(f"{name} imports {target}: {'make it relative' if own else 'wheels stand alone'}")
                if target in natives:
                    continue
                imported.update(m for m in (target, target.rpartition(".")[0]) if m in modules and m != name)
        # importing a.b runs a/__init__.py first; that is no edge that the file wrote
        yield name, {m for m in imported if not any(other.startswith(f"{m}.") for other in imported)}


def _imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.orelse)
        else:
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from _imports(getattr(node, field, []))


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[str]:
    """Full names of what is imported; for ``from m import x`` both ``m.x`` and, through it, ``m``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        parts = module.split(".")
        parents = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parents, *([base] if base else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


if __name__ == "__main__":
    sys.exit(main())
