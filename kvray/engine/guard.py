"""Nothing that is raised in kvray reaches the engine (rule 5).

The methods that vLLM calls are wrapped: an error there is logged once with its story, kvray
switches itself off in this process, and the answer of this and each later call is the harmless
one. The engine serves on, uncached.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

logger = logging.getLogger("kvray.engine")

P = ParamSpec("P")
R = TypeVar("R")


class Guarded(Protocol):
    """faulted: None, or why kvray is off in this process."""

    faulted: str | None


G = TypeVar("G", bound=Guarded)


def guarded(
    harmless: Callable[..., R],
) -> Callable[[Callable[Concatenate[G, P], R]], Callable[Concatenate[G, P], R]]:
    """Wrap a method that vLLM calls. harmless: makes the answer of a kvray that is off; it is
    called with the method's own arguments.
    """

    def wrap(method: Callable[Concatenate[G, P], R]) -> Callable[Concatenate[G, P], R]:
        @functools.wraps(method)
        def call(self: G, *args: P.args, **kwargs: P.kwargs) -> R:
            if self.faulted is not None:
                return harmless(self, *args, **kwargs)
            try:
                return method(self, *args, **kwargs)
            except Exception as exc:
                self.faulted = f"{method.__qualname__}: {type(exc).__name__}: {exc}"
                logger.exception(
                    "kvray: a bug in %s; this engine goes on without kvray. Please report it",
                    method.__qualname__,
                )
                return harmless(self, *args, **kwargs)

        return cast("Callable[Concatenate[G, P], R]", call)

    return wrap


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """The harmless answer of a method that answers nothing."""
