"""What was recorded of engines' rounding: tests/data/kv_noise.json, and how it is read.

    benchmarks/engines/noise.py ──real engines──▶ kv_noise.json ──▶ tests.noise, tests/unit

A sample is one block computed twice: for each layer the relative error, as kvray.node.comparing
works it out.
"""

import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvray.core.messages import NoiseLevels

PATH = Path(__file__).resolve().parent.parent / "data" / "kv_noise.json"


@dataclass(frozen=True, slots=True)
class Machine:
    """An engine that was recorded. maker: as it was said; alone, batched: its own noise."""

    maker: int
    alone: float
    batched: float

    @property
    def noise(self) -> NoiseLevels:
        return NoiseLevels(self.alone, self.batched)


@dataclass(frozen=True, slots=True)
class Sample:
    """mine, other: engines; my_way, other_way: in which the block was computed. errors: by layer,
    the first one first.
    """

    mine: str
    my_way: str
    other: str
    other_way: str
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """Engines of one model and dtype: those that could meet. compared, equal: how many blocks were,
    and how many of them bit for bit; of these, `honest` is a part, half of it the worst. different:
    beside an engine that computes something else, by what that is.
    """

    model: str
    dtype: str
    engines: dict[str, Machine]
    compared: int
    equal: int
    largest: tuple[float, ...]
    honest: tuple[Sample, ...]
    different: dict[str, tuple[Sample, ...]]


@dataclass(frozen=True, slots=True)
class Record:
    """source: the machine and the versions that it is from."""

    source: dict[str, Any]
    families: tuple[Family, ...]


@functools.cache
def load(path: Path = PATH) -> Record:
    found = json.loads(path.read_text())
    return Record(found["source"], tuple(_family(one) for one in found["families"]))


def save(record: Record, path: Path) -> None:
    """A line for each sample, so that two records can be compared by eye."""
    text = json.dumps(asdict(record), default=str).replace('{"mine"', '\n{"mine"')
    path.write_text(text + "\n")


def _family(found: dict[str, Any]) -> Family:
    return Family(
        **{name: found[name] for name in ("model", "dtype", "compared", "equal")},
        largest=tuple(found["largest"]),
        engines={name: Machine(**one) for name, one in found["engines"].items()},
        honest=_samples(found["honest"]),
        different={name: _samples(rows) for name, rows in found["different"].items()},
    )


def _samples(rows: list[dict[str, Any]]) -> tuple[Sample, ...]:
    return tuple(Sample(**{**row, "errors": tuple(row["errors"])}) for row in rows)
