"""Fixtures of tests that need two nodes in two network namespaces, joined by TCP."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.namespaces import Namespaces, NamespacesError, namespaces

if TYPE_CHECKING:
    from tests.ray_nodes import Nodes


@pytest.fixture(scope="module")
def net() -> Iterator[Namespaces]:
    """The namespace of node 1. Skips where namespaces are not allowed."""
    from benchmarks.fault_link import NAMESPACE

    try:
        with namespaces(NAMESPACE) as made:
            yield made
    except NamespacesError as exc:
        pytest.skip(f"no network namespaces here: {exc}")


@pytest.fixture(scope="module")
def split(net: Namespaces, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Nodes]":
    """A Ray cluster of two such nodes with kvray on them."""
    from benchmarks.fault_link import split_nodes

    with split_nodes(net, tmp_path_factory.mktemp("split")) as made:
        yield made
