"""One Seam for all tests of a module."""

import logging
from collections.abc import Iterator

import pytest

pytest.importorskip("vllm")

from tests.seam.pairs import Seam, seam
from tests.seam.states import World

AMPLE_BUDGET_MS = 1_000  # one story each: there is time for a host that is busy


@pytest.fixture(scope="module")
def made() -> Iterator[Seam]:
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # a switch-off is logged with its story, and is wanted here
    try:
        with seam() as made:
            yield made
    finally:
        logging.disable(disabled)


@pytest.fixture
def world(made: Seam) -> Iterator[World]:
    """The chunks of STORED are in the slab, and not on the device."""
    with made.world(step_budget_ms=AMPLE_BUDGET_MS) as world:
        world.fill_slab()
        yield world
