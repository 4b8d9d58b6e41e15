"""The two lines of megatron-core: which is taken, and what is used of it without its promise."""

import importlib.metadata
import sys

import pytest

from megatron_memory import upstream
from megatron_memory.exceptions import ConfigurationError
from megatron_memory.upstream import private_names


def test_every_private_name_is_there():
    assert private_names.missing(private_names.NAMES) == []
    assert private_names.missing(upstream.fitting("checkpoints").PRIVATE_NAMES) == []


def test_a_name_that_is_gone_is_named():
    gone = {"torch": ("_fused_adam_", "_gone"), "torch.gone": ("x",), "json": ("JSONDecoder.gone",)}
    assert private_names.missing(gone) == ["torch._gone", "torch.gone.x", "json.JSONDecoder.gone"]


def test_the_line_fits_the_python():
    installed = importlib.metadata.version("megatron-core")
    assert installed.startswith("0.19." if sys.version_info >= (3, 12) else "0.16.")
    assert upstream.core.__name__.endswith(installed[:4].replace(".", "_"))


def test_another_line_is_refused_by_its_version(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.17.1")
    with pytest.raises(ConfigurationError, match=r"megatron-core 0\.17\.1 .* 0\.16 and 0\.19"):
        upstream.fitting("core")


def test_without_it_the_way_to_install_it_is_said(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigurationError, match="megatron-core is not installed: .*make setup"):
        upstream.fitting("core")


@pytest.mark.parametrize("name", ["core", "checkpoints"])
def test_both_lines_have_the_same_names(name: str):
    """Read as text: of the checkpoints' modules only one can be imported."""
    import ast
    from pathlib import Path

    def names_of(line: str) -> set[str]:
        path = Path(upstream.__file__).with_name(f"{name}_{line.replace('.', '_')}.py")
        found = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.add(f"{node.name}({', '.join(arg.arg for arg in node.args.args)})")
            elif isinstance(node, ast.Assign):
                found.update(ast.unparse(target) for target in node.targets)
        return {name for name in found if not name.startswith("_")}

    first, second = map(names_of, upstream.LINES)
    assert first == second and len(first) > 2
