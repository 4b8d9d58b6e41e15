"""Two hosts for the tests of this folder."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.multinode.hosts import Host, NoNamespaces, two_hosts
from tests.training.conftest import dataset

__all__ = ["dataset"]


@pytest.fixture(scope="session")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Both, or a skip with what this machine said."""
    with contextlib.ExitStack() as stack:
        try:
            pair = stack.enter_context(two_hosts())
        except NoNamespaces as reason:
            pytest.skip(f"this machine cannot make hosts: {reason}")
        yield pair
