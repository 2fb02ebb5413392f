"""Examples run, and every setting is explained."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
from pathlib import Path

import ds_kernels
import pytest
from ds_kernels import AdamConfig, AdamHyper, CpuBackend, use_backend
from ds_kernels.config import LionConfig
from ds_kernels.hyper import AdagradHyper, LambHyper, LionHyper, SgdHyper
from ds_kernels.optim import StochasticRounding

MODULES = [
    info.name for info in pkgutil.walk_packages(ds_kernels.__path__, "ds_kernels.") if "_native" not in info.name
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if name.endswith(("triton.activations", "triton.norms")) and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    module = importlib.import_module(name)
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    assert doctest.testmod(module, optionflags=options).failed == 0


def test_every_public_class_and_function_has_an_example():
    public = [vars(ds_kernels)[name] for name in ds_kernels.__all__]
    assert [item.__name__ for item in public if ">>>" not in (item.__doc__ or "")] == [
        "BackendInfo",
        "registry",
    ]


def test_the_readmes_programs_run():
    readme = Path(__file__).parents[1] / "README.md"
    if not readme.exists():
        pytest.skip("there is no README.md beside the tests")
    programs = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    assert len(programs) == 9
    for program in programs:
        with use_backend("reference"):
            exec(compile(program, str(readme), "exec"), {})


@pytest.mark.parametrize(
    "kind",
    [AdamConfig, LionConfig, AdamHyper, LionHyper, AdagradHyper, SgdHyper, LambHyper, CpuBackend, StochasticRounding],
)
def test_every_field_has_a_docstring(kind):
    body = ast.parse(inspect.getsource(kind)).body[0].body
    explained = [
        node.target.id
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr)
    ]
    assert explained == [field.name for field in dataclasses.fields(kind)]
