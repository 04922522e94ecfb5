"""Which way a part of a job takes: by what it looks like, and by what device and driver can do."""

import pytest

from kvray.core.copy_ways import MIN_GATHER_PIECES, Abilities, Way, choose_way
from kvray.core.direction import Direction

ALL = Abilities(batches=True, gathers=True)
OLD_DRIVER = Abilities(batches=False, gathers=False)
NO_CUPY = Abilities(batches=True, gathers=False)
KIB = 1_024
LOAD, STORE = Direction.LOAD, Direction.STORE


@pytest.mark.parametrize(
    ("direction", "count", "page_bytes", "abilities", "expected"),
    [
        (LOAD, 1_000, 64 * KIB, ALL, Way.BATCH),
        (LOAD, 1_000, 4 * KIB, ALL, Way.GATHER),
        (STORE, 1_000, 4 * KIB, ALL, Way.BATCH),
        (LOAD, MIN_GATHER_PIECES - 1, 4 * KIB, ALL, Way.BATCH),
        (LOAD, 1_000, 4 * KIB, NO_CUPY, Way.BATCH),
        (LOAD, 1_000, 4 * KIB, OLD_DRIVER, Way.SINGLE),
        (STORE, 1_000, 64 * KIB, OLD_DRIVER, Way.SINGLE),
    ],
)
def test_the_way_of_a_part(
    direction: Direction, count: int, page_bytes: int, abilities: Abilities, expected: Way
) -> None:
    found = choose_way(
        direction=direction,
        piece_count=count,
        total_bytes=count * page_bytes,
        is_locked=True,
        abilities=abilities,
    )
    assert found is expected


@pytest.mark.parametrize("abilities", [ALL, NO_CUPY, OLD_DRIVER])
def test_memory_that_is_not_locked_goes_piece_by_piece(abilities: Abilities) -> None:
    """A kernel must not touch it, and of a batch nothing is promised about it."""
    found = choose_way(
        direction=LOAD, piece_count=99, total_bytes=99, is_locked=False, abilities=abilities
    )
    assert found is Way.SINGLE


def test_the_mean_of_joined_pieces_counts_and_the_bound_is_measured() -> None:
    bounds = {LOAD: 8 * KIB, STORE: 16 * KIB}
    ways = [
        choose_way(
            direction=direction,
            piece_count=100,
            total_bytes=100 * 8 * KIB,
            is_locked=True,
            abilities=ALL,
            gather_below_bytes=bounds,
        )
        for direction in (LOAD, STORE)
    ]
    assert ways == [Way.BATCH, Way.GATHER]
