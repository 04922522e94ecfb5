"""Each argument of each public method, replaced by what it is not: an error to the caller, and the
same processes afterwards.

Method: a real cluster of one node. The methods are those that are there: of the actors' classes, of
kvray's functions and of its Cluster. Values that would be right by their type are left out, so that
nothing is stopped, drained or waited for.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import ray

import kvray
from kvray.actors import RAY_NAMESPACE, directory_name, page_name
from kvray.directory.actor import Directory
from kvray.errors import NodeLostError
from kvray.node.actor import NodeStore
from kvray.watch.page import Page, open_page
from tests.fuzz.outcome import Outcome, rounds
from tests.ray_nodes import Nodes, running_nodes

ANSWER_LIMIT_S = 20.0
KEY = b"k" * 16
WRONG: tuple[object, ...] = (
    *(None, True, False, -1, 2**63, 2**64, -(2**70), 0.5, -0.5, float("nan"), float("inf")),
    *("", "x", "\0", "a" * 10_000, "\u202e\x1b[2J", "../../etc/passwd", "0" * 57),
    *(b"", b"x", b"k" * 15, b"k" * 17, b"\xff" * 4_096, bytearray(KEY)),
    *([], [None], ["x"], [b"x"], [KEY, KEY], [bytearray(KEY)], [2**70], [[KEY]]),
    *((), {}, {"a": 1}, {1, 2}, range(3), object, 1j),
)
# A right value of each name of an argument, for the other arguments of the call.
RIGHT: Mapping[str, object] = {
    "data": b"",
    "key": KEY,
    "keys": [KEY],
    "sizes": [4_096],
    "node_id": "f" * 56,
    "peer_id": "f" * 56,
    "epoch": 1,
    "is_far": False,
    "version": "1",
}
# Values of WRONG that are right for an argument, or change nothing that is looked at.
NOT_WRONG: Mapping[str, tuple[type, ...]] = {
    "progress": (type(None), type),
    "node_count": (type(None),),
    "config": (type(None),),
    "deadline_s": (float,),
}


@dataclass(frozen=True)
class Method:
    """call: takes arguments by name."""

    name: str
    parameters: tuple[str, ...]
    call: Callable[..., Any]


def methods_of(nodes: Nodes) -> list[Method]:
    """All that take an argument."""
    cluster = nodes.cluster
    open_page(cluster)
    name = cluster.name
    actors: list[tuple[type, Any]] = [
        (Directory, ray.get_actor(directory_name(name), namespace=RAY_NAMESPACE)),
        (Page, ray.get_actor(page_name(name), namespace=RAY_NAMESPACE)),
        (NodeStore, nodes.store(0)),
    ]
    found = [
        Method(f"{kind.__name__}.{method}", parameters, _remote(handle, method))
        for kind, handle in actors
        for method, parameters in _public(kind)
    ]
    found += [
        Method(f"Cluster.{method}", parameters, getattr(cluster, method))
        for method, parameters in _public(kvray.Cluster)
    ]
    found += [
        Method(f"kvray.{function}", _parameters(getattr(kvray, function)), getattr(kvray, function))
        for function in kvray.__all__
        if inspect.isfunction(getattr(kvray, function))
    ]
    return [method for method in found if method.parameters]


def _remote(handle: Any, method: str) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        return ray.get(getattr(handle, method).remote(**given), timeout=ANSWER_LIMIT_S)

    return call


def _public(kind: type) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, member in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_"):
            yield name, _parameters(member)


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Without those that Ray adds, whose names begin with a line."""
    named = inspect.signature(function).parameters.values()
    return tuple(
        one.name
        for one in named
        if one.name != "self" and one.name[0] != "_" and one.kind is not one.VAR_KEYWORD
    )


def cases_of(methods: list[Method]) -> list[tuple[Method, str, object]]:
    return [
        (method, parameter, wrong)
        for method in methods
        for parameter in method.parameters
        for wrong in WRONG
        if not isinstance(wrong, NOT_WRONG.get(parameter, ()))
    ]


def run(random: Random, seconds: float) -> Outcome:
    """All cases, in another order for another seed; the time says only when to stop."""
    outcome = Outcome()
    with running_nodes(1) as nodes:
        methods = methods_of(nodes)
        cases = cases_of(methods)
        random.shuffle(cases)
        before = pids(nodes)
        for number in rounds(outcome, seconds):
            if number >= len(cases):
                outcome.cases -= 1
                break
            method, parameter, wrong = cases[number]
            given = {name: RIGHT[name] for name in method.parameters if name in RIGHT}
            _try(method, given | {parameter: wrong}, outcome)
        if pids(nodes) != before:
            outcome.fail(f"other processes: {before} before, {pids(nodes)} now")
        outcome.methods = len(methods)
    return outcome


def _try(method: Method, given: dict[str, object], outcome: Outcome) -> None:
    shown = f"{method.name}({', '.join(f'{k}={v!r:.60}' for k, v in given.items())})"
    keys = given["keys"] if method.name == "Cluster.where" else None
    try:
        if keys is None:
            method.call(**given)
        else:  # they come one after another
            method.call(*(keys if isinstance(keys, (list, tuple)) else [keys]))
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as exc:
        outcome.fail(f"{shown}: {type(exc).__name__}")
    except NodeLostError as exc:
        if "does not answer" in str(exc):
            outcome.fail(f"{shown}: {exc}")
    except AssertionError as exc:
        outcome.fail(f"{shown}: AssertionError: {exc}")
    except Exception:  # noqa: BLE001, S110 (an error to the caller, as it should be)
        pass


def pids(nodes: Nodes) -> list[int]:
    directory: Any = ray.get_actor(directory_name(nodes.cluster.name), namespace=RAY_NAMESPACE)
    return [int(ray.get(directory.pid.remote())), int(nodes.status(0)["pid"])]
