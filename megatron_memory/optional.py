"""The optional packages: what each is for and how to install it. Nothing else imports them.

Standard library only: `tools/doctor.py` reads this list where not even torch is installed.
"""

import dataclasses
import importlib
import importlib.machinery
import importlib.util
from types import ModuleType

from megatron_memory.exceptions import ConfigurationError


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptionalPackage:
    """A package that the project uses where it is installed."""

    name: str
    """What `require` is asked for."""
    module: str
    """The module whose import shows that it works."""
    distribution: str
    """Its name in the package index, or the name under which its own build installs it."""
    purpose: str
    """What it adds."""
    install: str
    """The command that installs it, run in the checkout."""


OPTIONAL_PACKAGES: dict[str, OptionalPackage] = {
    package.name: package
    for package in (
        OptionalPackage(
            name="te",
            module="transformer_engine.pytorch",
            distribution="transformer-engine",
            purpose="fused layers, fp8 and context parallel on GPUs; its fused Adam",
            install="python -m pip install --no-build-isolation -e '.[te]'",
        ),
        OptionalPackage(
            name="apex",
            # The index's `apex` is another project: only NVIDIA's has optimizers.
            module="apex.optimizers",
            distribution="apex",
            purpose="fused Adam on GPUs where Transformer Engine is missing",
            install=(
                "git clone https://github.com/NVIDIA/apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "
                "python -m pip install --no-build-isolation ./apex"
            ),
        ),
        OptionalPackage(
            name="eval",
            module="lm_eval",
            distribution="lm-eval",
            purpose="standard benchmarks of trained models",
            install="python -m pip install -e '.[eval]'",
        ),
        OptionalPackage(
            name="zstandard",
            module="zstandard",
            distribution="zstandard",
            purpose="corpora in .zst for tools/preprocess_data.py",
            install="python -m pip install -e '.[data]'",
        ),
        OptionalPackage(
            name="pyarrow",
            module="pyarrow.parquet",
            distribution="pyarrow",
            purpose="corpora in .parquet for tools/preprocess_data.py",
            install="python -m pip install -e '.[data]'",
        ),
        OptionalPackage(
            name="resiliency",
            module="nvidia_resiliency_ext",
            distribution="nvidia-resiliency-ext",
            purpose="heartbeats to its ft_launcher, beside --rank-timeout",
            install="python -m pip install -e '.[resiliency]'",
        ),
    )
}


def is_installed(name: str) -> bool:
    """Whether the optional package is there; it may still fail to import. Imports nothing of it.

    Raises:
        KeyError: no optional package of that name.
    """
    top_level, _, submodule = OPTIONAL_PACKAGES[name].module.partition(".")
    spec = importlib.util.find_spec(top_level)
    if spec is None:
        return False
    if not submodule:
        return True
    locations = list(spec.submodule_search_locations or ())
    return importlib.machinery.PathFinder.find_spec(submodule, locations) is not None


def require(name: str) -> ModuleType:
    """Import an optional package.

    Args:
        name: a key of `OPTIONAL_PACKAGES`.

    Returns:
        The package's `module`.

    Raises:
        ConfigurationError: it is missing or broken; the message has the line that installs it.
        KeyError: no optional package of that name.
    """
    package = OPTIONAL_PACKAGES[name]
    if not is_installed(name):
        raise ConfigurationError(
            f"{package.distribution} is not installed ({package.purpose}). "
            f"Install it with: {package.install}"
        )
    try:
        return importlib.import_module(package.module)
    except (ImportError, OSError) as error:  # OSError: a shared library that it loads is missing
        raise ConfigurationError(
            f"{package.distribution} is installed, but {package.module} does not import: {error}. "
            f"Install it again with: {package.install}"
        ) from error
