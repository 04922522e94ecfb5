"""Nothing that is raised in kvray reaches the engine (rule 5).

The methods that vLLM calls are wrapped: an error there is logged once with its story, kvray
switches itself off in this process, and the answer of this and each later call is the harmless
one. The engine serves on, uncached. Whoever waits or holds something is told of the switch-off.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

logger = logging.getLogger("kvray.engine")

P = ParamSpec("P")
R = TypeVar("R")


class Switch:
    """One for all that go off together: a half of an engine in one process.

    on ──a bug, or word of one in the other half──▶ off, for the rest of the process
    """

    def __init__(self) -> None:
        self.off: str | None = None  # why
        self._told: list[Callable[[], None]] = []

    def when_off(self, act: Callable[[], None]) -> None:
        """act gives up what waits or is held. Called once, on the engine's thread."""
        self._told.append(act)

    def turn_off(self, why: str) -> None:
        """A second call does nothing."""
        if self.off is not None:
            return
        self.off = why
        for act in self._told:
            try:
                act()
            except Exception:
                logger.exception("kvray: a bug while it switches itself off")


class Guarded(Protocol):
    switch: Switch


G = TypeVar("G", bound=Guarded)


def guarded(
    harmless: Callable[..., R], *, also_off: bool = False
) -> Callable[[Callable[Concatenate[G, P], R]], Callable[Concatenate[G, P], R]]:
    """Wrap a method that vLLM calls. harmless: makes the answer of a kvray that is off; it is
    called with the method's own arguments. also_off: of what gives back what is held, which is
    tried by a kvray that is off, too.
    """

    def wrap(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
        @functools.wraps(method)
        def call(self: G, *args: P.args, **kwargs: P.kwargs) -> R:
            was_off = self.switch.off is not None
            if was_off and not also_off:
                return harmless(self, *args, **kwargs)
            try:
                return method(self, *args, **kwargs)
            except Exception as exc:
                if not was_off:
                    logger.exception(
                        "kvray: a bug in %s; this engine goes on without kvray. Please report it",
                        method.__qualname__,
                    )
                self.switch.turn_off(f"{method.__qualname__}: {type(exc).__name__}: {exc}")
                return harmless(self, *args, **kwargs)

        return cast("Callable[Concatenate[G, P], R]", call)

    return wrap


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """The harmless answer of a method that answers nothing."""
