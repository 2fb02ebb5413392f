"""Examples run, and every setting of a codec is explained."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path

import ds_comm
import ds_comm.codecs
import pytest

MODULES = [info.name for info in pkgutil.walk_packages(ds_comm.__path__, f"{ds_comm.__name__}.")]


@pytest.mark.parametrize("name", [name for name in MODULES if "_native" not in name])
def test_examples_run(name):
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(importlib.import_module(name), optionflags=options).failed == 0


README = Path(__file__).parents[1] / "README.md"
PROGRAMS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if README.exists() else []


@pytest.mark.skipif(not PROGRAMS, reason="there is no README.md beside the tests")
@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_the_readmes_programs_run(number):
    program = PROGRAMS[number]
    if "ds_shm" in program and find_spec(f"{ds_comm.__name__}._shm") is None:
        pytest.skip("needs the native module")
    exec(compile(program, str(README), "exec"), {})


@pytest.mark.parametrize("name", [name for name in ds_comm.codecs.__all__ if name[0].isupper()])
def test_every_field_has_a_docstring(name):
    kind = vars(ds_comm.codecs)[name]
    body = ast.parse(inspect.getsource(kind)).body[0].body
    explained = [
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    ]
    assert explained == [field.name for field in dataclasses.fields(kind)]
