"""One choice per process, undone exactly; other distributions' backends are found, and faults are named."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from ds_kernels import CpuBackend, ReferenceBackend, Registry, backends, registry, use_backend

CPU = torch.device("cpu")
ADAMW = ("adamw", CPU, torch.float32)
GOOD = """
    from ds_kernels import ReferenceBackend

    class Plugin:
        role_version = 1
        config_type = None
        def build(self, config, context):
            assert config is None
            assert context.device.type == "cpu"
            return ReferenceBackend()

    plugin = Plugin()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a distribution that offers a backend: a module and its metadata, as pip would lay them out."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def install(distribution: str, name: str, source: str = GOOD) -> Path:
        module = distribution.replace("-", "_")
        path = tmp_path / f"{module}.py"
        path.write_text(dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ds.kernels]\n{name} = {module}:plugin\n")
        return path

    yield install
    for module in set(sys.modules) - before:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[module]


def test_the_built_in_backends_are_listed():
    found = backends()
    assert found["reference"] == ("reference", "built in", None)
    assert found["cpu"].unusable == CpuBackend().unusable()


def test_the_automatic_choice_is_logged_once(cpu, caplog):
    owner = Registry()
    with caplog.at_level(logging.INFO):
        assert owner.kernel(*ADAMW) is owner.kernel(*ADAMW)
        assert owner.kernel(*ADAMW).__self__ == cpu
    assert owner.provider(*ADAMW) == "cpu"
    assert caplog.messages == ["kernels for cpu are taken from: cpu, reference"]


def test_a_device_without_a_backend_gets_the_reference(caplog):
    owner = Registry()
    with caplog.at_level(logging.INFO):
        assert owner.provider("adamw", torch.device("meta"), torch.float32) == "reference"
    assert caplog.messages == ["kernels for meta are taken from: reference"]


def test_a_choice_lasts_until_the_next(cpu):
    owner = Registry()
    owner.use("reference")
    assert owner.provider(*ADAMW) == "reference"
    owner.use("cpu")
    assert owner.provider(*ADAMW) == "cpu"


def test_blocks_nest_and_are_undone_exactly(install, cpu):
    install("acme-kernels", "acme")
    owner = Registry()
    automatic = owner.kernel(*ADAMW)
    with owner.use("reference") as outer:
        assert owner.kernel(*ADAMW).__self__ is outer
        with owner.use("acme") as inner:
            assert owner.kernel(*ADAMW).__self__ is inner
            owner.use("cpu")
            assert owner.provider(*ADAMW) == "cpu"
        assert owner.kernel(*ADAMW).__self__ is outer
    assert owner.kernel(*ADAMW).__self__ is automatic.__self__


def test_an_error_in_the_block_undoes_the_choice():
    owner = Registry()
    chosen = owner.use("reference")
    with pytest.raises(KeyError), owner.use("reference"):
        raise KeyError
    with chosen as backend:
        assert owner.kernel(*ADAMW).__self__ is backend


def test_a_failed_choice_changes_nothing(install):
    install("bad-kernels", "bad", "raise OSError('no driver')")
    owner = Registry()
    with owner.use("reference") as backend:
        with pytest.raises(RuntimeError):
            owner.use("bad")
        assert owner.kernel(*ADAMW).__self__ is backend


def test_the_process_has_one_registry():
    before = registry().kernel(*ADAMW)
    with use_backend("reference") as backend:
        assert registry().kernel(*ADAMW).__self__ is backend
    assert registry() is registry()
    assert registry().kernel(*ADAMW).__self__ == before.__self__


def test_another_distributions_backend_is_loaded_when_named(install):
    install("acme-kernels", "acme")
    owner = Registry()
    assert owner.backends()["acme"] == ("acme", "acme-kernels", None)
    assert "acme_kernels" not in sys.modules
    with owner.use("acme") as backend:
        assert isinstance(backend, ReferenceBackend)
    assert "acme_kernels" in sys.modules


def test_a_backends_own_settings_take_their_defaults(install):
    source = """
        import dataclasses
        from ds_kernels import CpuBackend

        @dataclasses.dataclass(frozen=True)
        class Settings:
            isa: str = "scalar"

        class Plugin:
            role_version = 1
            config_type = Settings
            def build(self, config, context):
                return CpuBackend(isa=config.isa)

        plugin = Plugin()
    """
    if CpuBackend().unusable() is not None:
        pytest.skip(CpuBackend().unusable())
    install("tuned-kernels", "tuned", source)
    with Registry().use("tuned") as backend:
        assert backend.isa == "scalar"


def test_a_missing_backend_lists_what_is_installed(install):
    install("acme-kernels", "acme")
    names = "acme, cpu, cutlass, nvrtc, reference, triton"
    message = rf"no kernel backend 'amce' is installed; installed are {names}; pip install"
    with pytest.raises(ValueError, match=message):
        Registry().use("amce")


def test_two_offers_of_one_name_are_an_error_that_names_both(install):
    install("acme-kernels", "fast")
    install("zenith-kernels", "fast")
    owner = Registry()
    assert owner.backends()["fast"].provider == "acme-kernels, zenith-kernels"
    assert "more than one" in owner.backends()["fast"].unusable
    with pytest.raises(ValueError, match="'fast' is offered by acme-kernels and zenith-kernels"):
        owner.use("fast")


def test_a_backend_that_fails_to_load_is_named(install):
    install("bad-kernels", "bad", "raise OSError('no driver')")
    with pytest.raises(RuntimeError, match=r"'bad' of bad-kernels \(bad_kernels:plugin\).*OSError: no driver"):
        Registry().use("bad")


def test_another_role_version_is_an_error_that_names_both(install):
    install("old-kernels", "old", GOOD.replace("role_version = 1", "role_version = 7"))
    with pytest.raises(RuntimeError, match="of old-kernels speaks version 7 of the role, this package version 1"):
        Registry().use("old")


def test_a_backend_that_cannot_run_here_says_why(install):
    source = GOOD.replace("return ReferenceBackend()", "return Broken()").replace(
        "class Plugin:",
        "class Broken:\n        def unusable(self): return 'no such card'\n\n    class Plugin:",
    )
    install("card-kernels", "card", source)
    owner = Registry()
    with pytest.raises(RuntimeError, match="the kernel backend 'card' cannot run here: no such card"):
        owner.use("card")
    assert owner.backends()["card"].unusable == "no such card"


def test_backends_of_other_distributions_are_tried_on_request(install):
    install("acme-kernels", "acme")
    install("bad-kernels", "bad", "raise OSError('no driver')")
    owner = Registry()
    assert owner.backends()["bad"].unusable is None
    found = owner.backends(load=True)
    assert found["acme"].unusable is None
    assert "OSError: no driver" in found["bad"].unusable


def test_a_built_in_name_means_the_built_in_backend(install):
    install("acme-kernels", "reference")
    owner = Registry()
    assert owner.backends()["reference"].provider == "built in"
    assert isinstance(owner.use("reference").__enter__(), ReferenceBackend)
    assert "acme_kernels" not in sys.modules


PARTIAL = """
    class Backend:
        name = "partial"
        def unusable(self): return None
        def find(self, op, device, dtype):
            if op == "chunk_sumsq" and dtype.itemsize == 2:
                return lambda x, chunk: "mine"

    class Plugin:
        role_version = 1
        config_type = None
        def build(self, config, context): return Backend()

    plugin = Plugin()
"""


def test_a_backend_offers_what_it_can_and_the_rest_is_taken_from_others(install, caplog):
    install("some-kernels", "partial", PARTIAL)
    owner = Registry()
    with caplog.at_level(logging.INFO), owner.use("partial"):
        assert owner.kernel("chunk_sumsq", CPU, torch.bfloat16)(None, 64) == "mine"
        assert owner.provider("chunk_sumsq", CPU, torch.float32) != "partial"
        assert owner.provider(*ADAMW) != "partial"
    said = [text for text in caplog.messages if "has no" in text]
    assert said == [
        "the kernel backend 'partial' has no chunk_sumsq for torch.float32 on cpu",
        "the kernel backend 'partial' has no adamw for torch.float32 on cpu",
    ]
    assert owner.provider("chunk_sumsq", CPU, torch.bfloat16) != "partial"


def test_a_backend_given_comes_before_the_chosen_one():
    owner, given = Registry(), ReferenceBackend()
    with owner.use("reference"):
        assert owner.kernel(*ADAMW, given).__self__ is given


def test_a_name_that_is_no_op_is_an_error():
    with pytest.raises(ValueError, match="no kernel backend has an op 'adamv'"):
        Registry().kernel("adamv", CPU, torch.float32)


def test_the_choice_can_be_automatic_again_and_entered_again(cpu):
    owner = Registry()
    chosen = owner.use("reference")
    with owner.use(None):
        assert owner.provider(*ADAMW) == "cpu"
    assert owner.provider(*ADAMW) == "reference"
    with chosen:
        pass
    assert owner.provider(*ADAMW) == "cpu"
    with chosen as backend:
        assert backend.name == owner.provider(*ADAMW) == "reference"
    assert owner.provider(*ADAMW) == "cpu"


def test_a_plugin_that_cannot_be_built_is_named(install):
    source = GOOD.replace("return ReferenceBackend()", "raise OSError('boom')")
    install("broken-kernels", "broken", source)
    with pytest.raises(RuntimeError, match=r"'broken' of broken-kernels .* cannot be built: OSError: boom"):
        Registry().use("broken")
    install("empty-kernels", "empty", GOOD.replace("return ReferenceBackend()", "return object()"))
    with pytest.raises(RuntimeError, match=r"'empty' of empty-kernels .* has no attribute 'unusable'"):
        Registry().use("empty")
