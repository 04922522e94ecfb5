"""No damage to the first page of a slab is believed.

Method: a page as a NodeStore leaves it, in which each byte is changed in turn.
"""

import numpy as np
import pytest

from kvray.core import header_page
from kvray.core.header_page import HEADER_PAGE_DTYPE, Page
from kvray.core.ids import ClientId, Role
from kvray.core.layout import FORMAT_VERSION, MAGIC, PAGE_BYTES

NOW_MS = 1_800_000_000_000
DAY_MS = 24 * 3_600 * 1_000
NUMBERS = {
    "epoch": NOW_MS,
    "generation_mark": 70_000,
    "owner_pid": 4_711,
    "owner_start_ticks": 8_150_000,
}
ENGINE = ClientId(pid=4_712, start_ticks=8_150_100, nonce=2**63 + 5)
WORKER = ClientId(pid=4_194_304, start_ticks=1, nonce=7)


@pytest.fixture
def page() -> Page:
    page = np.zeros(1, HEADER_PAGE_DTYPE)
    page["magic"] = np.void(MAGIC)
    page["format"] = FORMAT_VERSION
    page["slab_id"] = np.void(b"s" * 16)
    page["boot_id"] = np.void(b"b" * 16)
    page["slab_bytes"], page["extent_bytes"] = 2 * 1024**2, 256 * 1024
    page["cluster"], page["node_id"] = b"default", b"0123456789abcdef"
    page["sum"] = header_page.fixed_sum(page)
    for name, value in NUMBERS.items():
        header_page.write_number(page, name, value)
    header_page.write_client(page, 0, ENGINE, Role.ENGINE, 0)
    header_page.write_client(page, 5, WORKER, Role.WORKER, 2**64 - 1)
    header_page.write_client(page, 3, WORKER, Role.WORKER, 9)
    header_page.write_client(page, 3, None, Role.WORKER, 0)
    return page


def meaning(page: Page) -> tuple[object, ...]:
    """All that a start takes from it."""
    fixed = [page[name][0].tobytes() for name in ("slab_id", "boot_id", "cluster", "node_id")]
    sizes = [int(page[name][0]) for name in ("format", "slab_bytes", "extent_bytes")]
    numbers = [header_page.read_number(page, name) for name in NUMBERS]
    return (*fixed, *sizes, *numbers, *header_page.rows_in_use(page))


def test_what_is_written_is_read(page: Page) -> None:
    assert not header_page.damage(page, wall_clock_ms=NOW_MS)
    assert {name: header_page.read_number(page, name) for name in NUMBERS} == NUMBERS
    assert [
        (row.row, row.client, row.role, row.engine_nonce)
        for row in header_page.rows_in_use(page)
        if row is not None
    ] == [(0, ENGINE, Role.ENGINE, 0), (5, WORKER, Role.WORKER, 2**64 - 1)]


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_each_byte_that_is_changed_changes_nothing_or_is_seen(page: Page, flip: int) -> None:
    before = meaning(page)
    for offset in range(8, PAGE_BYTES):  # the magic in front says whether it is a page at all
        other = page.copy()
        other.view(np.uint8)[offset] ^= flip

        seen = bool(header_page.damage(other, wall_clock_ms=NOW_MS))

        assert seen or meaning(other) == before, f"byte {offset}"


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_of_another_place_is_damage(page: Page, name: str) -> None:
    for other in NUMBERS.keys() - {name}:
        swapped = page.copy()
        swapped[name] = page[other]
        assert name in header_page.damage(swapped, wall_clock_ms=NOW_MS)


def test_an_epoch_of_the_day_after_tomorrow_bricks_no_node(page: Page) -> None:
    header_page.write_number(page, "epoch", NOW_MS + DAY_MS)
    assert not header_page.damage(page, wall_clock_ms=NOW_MS)

    header_page.write_number(page, "epoch", NOW_MS + DAY_MS + 1)

    assert "ahead of this host's clock" in header_page.damage(page, wall_clock_ms=NOW_MS)


def test_a_mark_that_leaves_too_few_generations_is_damage(page: Page) -> None:
    header_page.write_number(page, "generation_mark", header_page.MAX_MARK + 1)

    assert "generation mark" in header_page.damage(page, wall_clock_ms=NOW_MS)
