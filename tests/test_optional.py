"""megatron_memory.optional: optional packages present, missing and broken."""

import dataclasses
import re
import sys

import pytest

from megatron_memory import optional
from megatron_memory.exceptions import ConfigurationError


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Writes a package (with a submodule `part`) and lists it as the optional package `fake`."""

    def write(source: str, module: str = "fake_optional_package") -> None:
        folder = tmp_path / "fake_optional_package"
        folder.mkdir()
        (folder / "__init__.py").write_text(source)
        (folder / "part.py").write_text("VALUE = 1\n")
        entry = dataclasses.replace(
            optional.OPTIONAL_PACKAGES["eval"], name="fake", module=module, distribution="fake-dist"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(optional.OPTIONAL_PACKAGES, "fake", entry)

    yield write
    for name in [name for name in sys.modules if name.startswith("fake_optional_package")]:
        del sys.modules[name]


def test_an_installed_package_is_imported(fake_package):
    fake_package("", module="fake_optional_package.part")
    assert optional.is_installed("fake")
    assert optional.require("fake").VALUE == 1


def test_a_missing_package_raises_with_the_line_that_installs_it(fake_package):
    fake_package("", module="fake_optional_package_that_is_not_there")
    assert not optional.is_installed("fake")
    with pytest.raises(ConfigurationError, match=r"not installed.*pip install -e '\.\[eval\]'"):
        optional.require("fake")


def test_a_package_of_the_same_name_without_the_needed_module_counts_as_missing(fake_package):
    fake_package("raise AssertionError('looked for, not imported')", "fake_optional_package.other")
    assert not optional.is_installed("fake")
    with pytest.raises(ConfigurationError, match="not installed"):
        optional.require("fake")


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_broken_package_raises_with_its_own_error(fake_package, error):
    fake_package(f"raise {error}('libcudnn.so.9 is missing')")
    assert optional.is_installed("fake")
    with pytest.raises(ConfigurationError, match=r"fake-dist is installed, but .*libcudnn\.so\.9"):
        optional.require("fake")


def test_unknown_names_are_mistakes_of_ours():
    with pytest.raises(KeyError):
        optional.require("nothing-of-the-kind")


def test_every_extra_of_the_install_lines_exists():
    root = optional.__file__.rpartition("/megatron_memory/")[0]
    with open(f"{root}/pyproject.toml", encoding="utf-8") as file:
        pyproject = file.read()
    for name, package in optional.OPTIONAL_PACKAGES.items():
        if name != "apex":  # built from source
            extra = re.search(r"\[(\w+)\]", package.install).group(1)
            (listed,) = re.findall(rf"^{extra} = (\[.*\])$", pyproject, re.MULTILINE)
            assert f'"{package.distribution}' in listed
