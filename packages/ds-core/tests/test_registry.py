"""Plugins, found in real throw-away distributions."""

import subprocess
import sys
import textwrap

import pytest
from ds_core.protocols import GROUPS, ROLE_VERSIONS
from ds_core.registry import Installed, MissingPluginError, PluginError, installed, load

GOOD = """
    class Plugin:
        role_version = 1
        config_type = None

        def build(self, config, context):
            return "built"

    plugin = Plugin()
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a wheel with one module and one plugin, for the length of a test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def make(wheel, *, group="ds.store", name="disk", source=GOOD, version="1.2"):
        module = wheel.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {wheel}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:plugin\n")
        modules.append(module)
        return module

    yield make
    for module in modules:
        sys.modules.pop(module, None)


def test_an_installed_plugin_is_listed_without_importing_it(install):
    module = install("acme-store", source="raise RuntimeError('imported')")
    assert installed("ds.store") == [Installed("disk", "acme-store", "1.2", f"{module}:plugin")]
    assert module not in sys.modules


def test_a_named_plugin_is_loaded(install):
    install("acme-store")
    plugin = load("ds.store", "disk")
    assert plugin.build(None, None) == "built"
    assert load("ds.store", "disk") is plugin


def test_only_the_named_plugin_is_imported(install):
    install("acme-store")
    other = install("other-store", name="tape")
    load("ds.store", "disk")
    assert other not in sys.modules


def test_a_plugin_of_another_group_is_not_found(install):
    install("acme-store", group="ds.monitor")
    with pytest.raises(MissingPluginError):
        load("ds.store", "disk")


def test_a_missing_plugin_lists_what_is_installed_and_what_to_install(install):
    install("acme-store")
    install("tape-store", name="tape")
    with pytest.raises(MissingPluginError) as caught:
        load("ds.store", "disc")
    assert str(caught.value) == (
        "no installed wheel offers a plugin 'disc' in the group 'ds.store'; installed there: disk, tape; no "
        "wheel of ours offers any; did you mean 'disk'?"
    )
    assert caught.value.installed == ("disk", "tape")


def test_a_missing_plugin_of_a_group_of_ours_names_the_wheel():
    with pytest.raises(MissingPluginError, match="plugins of this group come with 'pip install ds-kernels'"):
        load("ds.kernels", "no such backend")
    with pytest.raises(MissingPluginError, match="come with 'pip install ds-kernels ds-zero ds-comm'"):
        load("ds.optimizer", "no such optimizer")


def test_two_wheels_with_one_name_are_both_named(install):
    install("acme-store")
    install("evil-store", version="6.6")
    with pytest.raises(PluginError) as caught:
        load("ds.store", "disk")
    assert "2 wheels offer a plugin 'disk' in the group 'ds.store'" in str(caught.value)
    assert "acme-store 1.2 (acme_store:plugin)" in str(caught.value)
    assert "evil-store 6.6 (evil_store:plugin)" in str(caught.value)
    assert [row.distribution for row in installed("ds.store")] == ["acme-store", "evil-store"]


def test_another_role_version_names_both(install):
    install("acme-store", source=GOOD.replace("role_version = 1", "role_version = 7"))
    with pytest.raises(PluginError) as caught:
        load("ds.store", "disk")
    assert "acme-store 1.2 speaks version 7 of its role" in str(caught.value)
    assert f"this ds-core speaks version {ROLE_VERSIONS['ds.store']}" in str(caught.value)


@pytest.mark.parametrize("group", ["ds.partitioner", "ds.pipeline"])
def test_a_role_that_has_grown_refuses_plugins_of_before(install, group):
    install("acme-parts", group=group, name="old")
    with pytest.raises(PluginError, match="speaks version 1 of its role, this ds-core speaks version 2"):
        load(group, "old")


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("other = 3", "AttributeError: module 'acme_store' has no attribute 'plugin'"),
        ("plugin = object()", "AttributeError: 'object' object has no attribute 'role_version'"),
    ],
)
def test_a_plugin_that_fails_to_import_is_named_with_its_wheel(install, source, cause):
    install("acme-store", source=source)
    with pytest.raises(PluginError) as caught:
        load("ds.store", "disk")
    assert "the plugin 'disk' (ds.store) of acme-store 1.2 failed to import from 'acme_store:plugin'" in str(
        caught.value
    )
    assert cause in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("function", [installed, lambda group: load(group, "disk")], ids=["installed", "load"])
def test_an_unknown_group_names_the_nearest(function):
    with pytest.raises(ValueError, match=r"unknown plugin group 'ds.stor'; did you mean 'ds.store'\?"):
        function("ds.stor")


def test_every_group_can_be_listed():
    for group in GROUPS:
        assert installed(group) == sorted(installed(group))


def test_a_wheel_installed_while_running_is_found(install):
    assert installed("ds.monitor") == []
    install("late-monitor", group="ds.monitor", name="late")
    assert [row.name for row in installed("ds.monitor")] == ["late"]


def test_importing_the_registry_reads_no_metadata():
    code = "import sys; import torch; sys.modules.pop('importlib.metadata', None); import ds_core.registry; "
    code += "assert 'importlib.metadata' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
