"""Fixtures that several kinds of tests share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests import leftovers
from tests.engines import Engine, Mode, assert_nothing_waits, start_engine

EngineFactory: TypeAlias = Callable[..., Engine]

pytest.register_assert_rewrite("tests.oracle")  # its asserts are a test's, and tell the values

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # tests ask nobody outside


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each module gives back what it has taken: made first, so it looks when all else has ended.

    Where Ray or NIXL are at work, whose own descriptors stay until the process ends, only those
    that lead to something of kvray count.
    """
    own_only = any(name in str(request.path) for name in ("/integration/", "/contract/"))
    before = leftovers.look()
    yield
    for item in request.session.items:
        # pytest keeps the arguments of the last test until after this, and a slab that it mapped.
        (getattr(item, "funcargs", None) or {}).clear()
    left = leftovers.wait_for_none(before, all_fds=not own_only)
    assert not left, f"left behind by {request.path.name}: {'; '.join(left)}"


def _factory(folder: Path) -> Iterator[EngineFactory]:
    engines: list[Engine] = []

    def start(model: Path, *, mode: Mode = Mode.IN_PROCESS, **arguments: Any) -> Engine:
        engine = start_engine(model, folder=folder, mode=mode, **arguments)
        engines.append(engine)
        return engine

    try:
        yield start
        for engine in engines:
            if engine.is_serving:
                assert_nothing_waits(engine)
    finally:
        for engine in engines:
            engine.ask_to_end()
        for engine in engines:
            engine.close()


@pytest.fixture
def engine_factory(tmp_path: Path) -> Iterator[EngineFactory]:
    """start_engine without its folder; what it has started ends with the test, and before it ends
    no request of it waits any more, whatever the test was about.

    The engines start side by side: ask for all of them before the first request.
    """
    yield from _factory(tmp_path)


@pytest.fixture(scope="module")
def shared_engine_factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineFactory]:
    """The same for engines that all tests of a module use: a start costs 8 to 20 s."""
    yield from _factory(tmp_path_factory.mktemp("engines"))
