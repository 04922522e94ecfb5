"""Looks at the directory every few milliseconds, so that "when was it noticed" has an answer."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayError

from kvray.actors import RAY_NAMESPACE, directory_name

LOOK_PERIOD_S = 0.02
LOOK_LIMIT_S = 0.5  # a directory that is being restarted does not answer


@dataclass(frozen=True, slots=True)
class Look:
    """What the directory said at a moment of time.monotonic(). nodes: only those on the roster."""

    at_s: float
    term: int
    epochs: dict[str, int]
    entries: dict[str, int]


class Watch:
    """A thread that looks. Failed looks are no looks."""

    def __init__(self, cluster_name: str) -> None:
        self._name = directory_name(cluster_name)
        self._looks: list[Look] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopping.set()
        self._thread.join()

    def first(self, since_s: float, condition: Callable[[Look], bool]) -> float | None:
        """Milliseconds from since_s to the first look for which the condition holds."""
        for look in list(self._looks):
            if look.at_s >= since_s and condition(look):
                return (look.at_s - since_s) * 1_000
        return None

    def burials(self, since_s: float = 0.0) -> int:
        """How often a node has left the roster, or has changed its epoch there."""
        looks = [look for look in list(self._looks) if look.at_s >= since_s]
        return sum(
            later.epochs.get(node_id) != epoch
            for look, later in pairwise(looks)
            if later.term == look.term
            for node_id, epoch in look.epochs.items()
        )

    def wait_for(
        self, since_s: float, condition: Callable[[Look], bool], *, limit_s: float
    ) -> float | None:
        """The same as first, but waits for it."""
        while (found := self.first(since_s, condition)) is None:
            if time.monotonic() - since_s > limit_s:
                return None
            time.sleep(LOOK_PERIOD_S)
        return found

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_PERIOD_S):
            try:
                directory: Any = ray.get_actor(self._name, namespace=RAY_NAMESPACE)
                seen = ray.get(directory.status.remote(), timeout=LOOK_LIMIT_S)
            except (RayError, GetTimeoutError, ValueError):
                continue
            listed = {
                node_id: node
                for node_id, node in seen["nodes"].items()
                if node["state"] in ("alive", "suspect")
            }
            self._looks.append(
                Look(
                    time.monotonic(),
                    seen["term"],
                    {node_id: node["epoch"] for node_id, node in listed.items()},
                    {node_id: node.get("entries", 0) for node_id, node in listed.items()},
                )
            )
