"""Shape of the product code: sizes, docstrings, forbidden constructs, the skeleton of each wheel.

Run as ``python scripts/check_shape.py``; prints each offence as ``path:line: text`` and exits with 1 if there is any.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
MAX_LINES_OF_DOCUMENTATION = 600  # if at most MAX_CODE_LINES of them are code
MAX_CODE_LINES = 250
MAX_FUNCTION_CODE_LINES = 50
SKELETON = ("pyproject.toml", "README.md", "LICENSE", "tests", "src/{package}/py.typed", "src/{package}/__init__.py")


def main() -> int:
    """Check all wheels; return the number of offences."""
    offences = [*_skeletons()]
    files = sorted(ROOT.glob("packages/*/src/**/*.py"))
    for path in files:
        offences += [f"{path.relative_to(ROOT)}:{line}: {text}" for line, text in _file(path)]
    offences += _notes(files)
    print("\n".join(offences) or f"{len(files)} files, no offence")
    return min(1, len(offences))


def _skeletons() -> Iterator[str]:
    for wheel in sorted(ROOT.glob("packages/*")):
        package = wheel.name.replace("-", "_")
        for name in SKELETON:
            if not (wheel / name.format(package=package)).exists():
                yield f"{wheel.relative_to(ROOT)}: has no {name.format(package=package)}"


def _file(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text()
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield 1, "no docstring that names the file's job"
    num_lines, code_lines = text.count("\n"), _code_lines(path, tree)
    if num_lines > (MAX_LINES_OF_DOCUMENTATION if len(code_lines) <= MAX_CODE_LINES else MAX_LINES):
        yield 1, f"{num_lines} lines, of which {len(code_lines)} of code: split the file"
    for node in ast.walk(tree):
        yield from _function(node, code_lines)
        yield from _forbidden(node, path)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.isascii():
            yield number, "not ASCII"


def _code_lines(path: Path, tree: ast.Module) -> set[int]:
    """Lines that hold code: no blank ones, comments, or docstrings."""
    documented: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            documented.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type not in blank and token.type != tokenize.ENCODING:
                lines.update(range(token.start[0], token.end[0] + 1))
    return lines - documented


def _function(node: ast.AST, code_lines: set[int]) -> Iterator[tuple[int, str]]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        length = len(code_lines.intersection(range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1)))
        if length > MAX_FUNCTION_CODE_LINES:
            yield node.lineno, f"{node.name} has {length} lines of code: split it"
    if isinstance(node, ast.ClassDef) and re.match(r"(Ds|DS|DeepSpeed)[A-Z]", node.name):
        yield node.lineno, f"{node.name}: the module path is the prefix"


def _forbidden(node: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "print", "exit"):
        yield node.lineno, f"{node.func.id}() in library code"
    if isinstance(node, ast.Global):
        yield node.lineno, "global statement"
    if isinstance(node, ast.Attribute) and node.attr == "environ" and path.name != "_env.py":
        yield node.lineno, "environment variables are read in _env.py only"


def _notes(files: list[Path]) -> Iterator[str]:
    """Every ``[Note: X]`` that is referred to is defined, at the start of a line of a docstring."""
    texts = {path: path.read_text() for path in files}
    defined = {name for text in texts.values() for name in re.findall(r"^ *\[Note: ([^\]]+)\]$", text, re.M)}
    for path, text in texts.items():
        for name in re.findall(r"\[Note: ([^\]]+)\]", text):
            if name not in defined:
                yield f"{path.relative_to(ROOT)}: refers to [Note: {name}], which stands nowhere"


if __name__ == "__main__":
    sys.exit(main())
