"""Two blocks side by side: what differs, in which piece, and when nothing can be said.

Goal: a verdict is the bytes' and no other's. Method: a slab of two slots with headers, numbers of
each kind in them, and what a thread could find wrong.
"""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kvray.core.commands import BlockPair, CompareBlocks, Verdict
from kvray.core.effects import Place
from kvray.core.ids import BlockKey, Generation, Maker, Origin, SlotIndex, SlotState
from kvray.core.layout import SLOT_HEADER_DTYPE
from kvray.core.messages import ChunkShape
from kvray.core.tolerance import Tolerance
from kvray.node.comparing import Compared, Comparing, compare

SIZE, PIECES = 8_192, 4
LOOSE = Tolerance(is_exact=False, first=0.02, others=0.1)
EXACT = Tolerance(is_exact=True, first=0.02, others=0.1)
RAW = {"float32": np.float32, "float16": np.float16}


def numbers(seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(SIZE // 4).astype(np.float32)


def raw(values: npt.NDArray[Any], dtype: str) -> bytes:
    """As a cache of this dtype holds them."""
    if dtype == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(RAW[dtype]).tobytes()


class World:
    """A slab with two READY blocks."""

    def __init__(self, one: bytes, two: bytes, dtype: str = "float32") -> None:
        size = len(one)
        self.slab = np.frombuffer(bytearray(one + two), np.uint8)
        self.headers = np.zeros(2, SLOT_HEADER_DTYPE)
        self.places = []
        for slot in range(2):
            key, maker = BlockKey(bytes([slot + 1]) * 16), Maker(slot + 5)
            place = Place(
                SlotIndex(slot),
                Generation(slot + 1),
                slot * size,
                size,
                key,
                Origin.ORIGINAL,
                maker,
            )
            self.places.append(place)
            row = self.headers[slot]
            row["generation"], row["key"], row["offset"] = slot + 1, np.void(key), place.offset
            row["bytes"], row["state"], row["maker"] = size, SlotState.READY, maker
        shape = ChunkShape(size, size // PIECES, dtype)
        self.pair = BlockPair(self.places[0], self.places[1], shape)

    def compare(self, tolerance: Tolerance = LOOSE) -> Compared:
        return compare(self.slab, self.headers, CompareBlocks(3, (self.pair,), tolerance))

    def verdict(self, tolerance: Tolerance = LOOSE) -> Verdict:
        (verdict,) = self.compare(tolerance).verdicts
        return verdict


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_is_told_from_other_numbers_in_each_dtype(dtype: str) -> None:
    values = numbers()
    assert World(raw(values, dtype), raw(values, dtype), dtype).verdict(EXACT) is Verdict.EQUAL
    rounded = World(raw(values, dtype), raw(values * 1.004, dtype), dtype)
    assert rounded.verdict() is Verdict.EQUAL
    assert rounded.verdict(EXACT) is Verdict.DIFFERENT
    other = World(raw(values, dtype), raw(numbers(1), dtype), dtype)
    assert other.compare() == Compared(3, (Verdict.DIFFERENT,), (0, 1, 2, 3))


def test_the_pieces_that_differ_are_named_and_the_first_one_may_differ_least() -> None:
    values = numbers()
    for piece, factor, expected in [(2, 1.5, (2,)), (2, 1.05, ()), (0, 1.05, (0,))]:
        changed = values.copy()
        part = len(values) // PIECES
        changed[piece * part : (piece + 1) * part] *= factor
        found = World(raw(values, "float32"), raw(changed, "float32")).compare()
        assert found.pieces == expected
        assert found.verdicts == (Verdict.DIFFERENT if expected else Verdict.EQUAL,)


@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_what_is_no_number_is_the_same_only_if_its_bytes_are(odd: float) -> None:
    values = numbers()
    values[5] = odd
    assert World(raw(values, "float32"), raw(values, "float32")).verdict() is Verdict.EQUAL
    near = values.copy()
    near[6] *= 1.0001
    assert World(raw(values, "float32"), raw(near, "float32")).verdict() is Verdict.DIFFERENT
    assert World(raw(near, "float32"), raw(numbers(), "float32")).verdict() is Verdict.DIFFERENT


def test_zeros_are_like_zeros_only() -> None:
    zeros = np.zeros(SIZE // 4, np.float32)
    assert World(raw(zeros, "float32"), raw(-zeros, "float32")).verdict() is Verdict.DIFFERENT
    assert World(raw(zeros, "float32"), raw(zeros, "float32")).verdict() is Verdict.EQUAL
    assert World(raw(zeros, "float32"), raw(numbers(), "float32")).verdict() is Verdict.DIFFERENT


def test_numbers_of_a_dtype_that_is_not_known_must_be_the_same() -> None:
    values = raw(numbers(), "float32")
    assert World(values, values, "float8_e4m3fn").verdict() is Verdict.EQUAL
    near = bytes([values[0] ^ 1]) + values[1:]
    assert World(values, near, "float8_e4m3fn").verdict() is Verdict.DIFFERENT
    assert World(values, near, "float32").verdict() is Verdict.EQUAL


@pytest.mark.parametrize("slot", [0, 1])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", SlotState.ABSENT),
        ("state", SlotState.WRITING),
        ("generation", 9),
        ("key", np.void(bytes(16))),
        ("maker", 99),
        ("offset", 4_096),
        ("bytes", 4_096),
    ],
)
def test_a_header_that_says_something_else_afterwards_is_no_verdict(
    slot: int, name: str, value: Any
) -> None:
    for two in (numbers(), numbers(1)):
        world = World(raw(numbers(), "float32"), raw(two, "float32"))
        world.headers[slot][name] = value
        assert world.verdict() is Verdict.NONE


def test_the_state_is_read_before_the_generation() -> None:
    """A slot that is occupied anew between the two looks must not pass: READY was of the old
    content, the generation is of the new one, or the other way round.
    """
    world = World(raw(numbers(), "float32"), raw(numbers(), "float32"))
    read: list[str] = []

    class Watched:
        """Headers that say what is read of them."""

        def __getitem__(self, rows: Any) -> Any:
            row = world.headers[rows]

            class Row:
                def __getitem__(self, name: str) -> Any:
                    read.append(name)
                    return row[name]

            return Row()

    compare(world.slab, Watched(), CompareBlocks(1, (world.pair,), LOOSE))  # type: ignore[arg-type]  # looks like an array
    assert read[:2] == ["state", "generation"]
    assert read.count("state") == 2
    assert read[len(read) // 2] == "state"


def test_a_block_of_another_size_than_its_shape_is_no_verdict() -> None:
    world = World(raw(numbers(), "float32"), raw(numbers(), "float32"))
    shape = ChunkShape(SIZE // 2, SIZE // 8, "float32")
    world.pair = BlockPair(world.pair.mine, world.pair.other, shape)
    assert world.verdict() is Verdict.NONE


def test_the_thread_answers_in_order_and_ends_with_what_it_has_in_hand() -> None:
    world = World(raw(numbers(), "float32"), raw(numbers(), "float32"))
    answered: list[Compared] = []
    came = threading.Semaphore(0)

    def take(compared: Compared) -> None:
        answered.append(compared)
        came.release()

    comparing = Comparing(world.slab, world.headers, take)
    comparing.start()
    for number in range(3):
        comparing.submit(CompareBlocks(number, (world.pair,), LOOSE))
    for _ in range(3):
        assert came.acquire(timeout=10)
    comparing.close()
    assert [compared.comparison_id for compared in answered] == [0, 1, 2]
    assert {compared.verdicts for compared in answered} == {(Verdict.EQUAL,)}
