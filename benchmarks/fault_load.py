"""A steady stream of requests whose documents repeat, each answer compared with a control.

    Library     which document is stored where, under which salt: a document with another salt has
                other keys and the same tokens, so a handful of controls serve any number of stores
    Load        a thread per engine: new document, one from the other node, one from its own node
    Outcome     what came of one request

Engines run in float32, where the tokens do not depend on how much of a prompt was cached.
"""

import itertools
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from benchmarks import fault_engine
from tests.engines import Engine, EngineError, start_engine
from tests.models import tiny
from tests.prompts import CHUNK_TOKENS, prompt_of

DOCUMENT_COUNT = 12
DOCUMENT_CHUNKS = 2
DOCUMENT_TOKENS = DOCUMENT_CHUNKS * CHUNK_TOKENS + 16  # the rest is computed every time
ANSWER_TOKENS = 2
# float32: 2 MiB a chunk; 32 blocks are room for one request at a time and little else.
ENGINE_SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 1_024,
    "kv_cache_memory_bytes": 64 << 20,
}
REQUEST_LIMIT_S = 30.0  # a request that has waited so long has failed
STOP_LIMIT_S = 60.0
# Between two requests of an engine: a machine on which each core computes all the time has none
# left for anybody who comes back. (The fault "none" makes no pause.)
THINK_S = 0.1
AFTER_ERROR_S = 0.1  # an engine that was killed is replaced soon
STOCK = 6  # documents stored by either engine that the other has not asked for, before a fault


Controls = tuple[list[list[int]], list[list[int]]]  # prompts, and the right answers


class Kind(Enum):
    NEW = "new"  # nobody has it: computed and stored
    LOCAL = "local"  # this engine has stored or fetched it
    PEER = "peer"  # the other engine has stored it, this one never asked


# Every other one is local, so that no more than one request lies between a NodeStore that is back
# and the hit that shows it. Two peers for one new: the stock is used up slowly.
TURNS = (Kind.LOCAL, Kind.PEER, Kind.LOCAL, Kind.NEW, Kind.LOCAL, Kind.PEER)


@dataclass(frozen=True, slots=True)
class Document:
    """One prompt under one salt."""

    index: int
    salt: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request that was answered, or was not. Times are time.monotonic()."""

    engine: int
    kind: Kind
    document: Document
    began_s: float
    ended_s: float
    failed: bool = False
    wrong: bool = False
    excused: bool = False  # its engine was killed on purpose
    local: int = 0
    peer: int = 0
    stored: int = 0
    cached_tokens: int = 0
    wait_ms: int = 0
    problem: str = ""


@dataclass(slots=True)
class Library:
    """Which documents each engine has (stored), and which it may fetch for the first time."""

    prompts: list[list[int]]
    controls: list[list[int]]
    salt: str
    stored: list[list[Document]] = field(default_factory=lambda: [[], []])
    fetchable: list[deque[Document]] = field(default_factory=lambda: [deque(), deque()])
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def choose(self, engine: int, kind: Kind) -> tuple[Kind, Document]:
        if kind is Kind.PEER and self.fetchable[engine]:
            return kind, self.fetchable[engine].popleft()
        if kind is Kind.LOCAL and self.stored[engine]:
            return kind, self._random.choice(self.stored[engine])
        number = next(self._numbers)
        return Kind.NEW, Document(number % len(self.prompts), f"{self.salt}-{number}")

    def note(self, engine: int, kind: Kind, document: Document) -> None:
        """The request has been answered."""
        if kind is Kind.LOCAL:
            return
        self.stored[engine].append(document)
        if kind is Kind.NEW:
            self.fetchable[1 - engine].append(document)

    def forget(self, engine: int) -> None:
        """The node of this engine has lost everything."""
        self.stored[engine].clear()
        self.fetchable[1 - engine].clear()


def make_controls(folder: Path) -> Controls:
    """Prompts and what an engine without kvray answers to them."""
    prompts = [prompt_of(DOCUMENT_TOKENS, seed=9_000 + i) for i in range(DOCUMENT_COUNT)]
    engine = start_engine(tiny(), folder=folder, enable_prefix_caching=False, **ENGINE_SETTINGS)
    try:
        controls = [engine.generate(prompt, max_tokens=ANSWER_TOKENS).tokens for prompt in prompts]
    finally:
        engine.close()
    return prompts, controls


class Load:
    """The stream. engines may be replaced while it runs; see `excuse`."""

    def __init__(
        self,
        engines: list[Engine],
        library: Library,
        *,
        turns: Sequence[Kind] = TURNS,
        think_s: float = THINK_S,
    ) -> None:
        self.engines = engines
        self._turns = turns
        self._think_s = think_s
        self.library = library
        self.outcomes: list[Outcome] = []
        self._excused: set[Engine] = set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._bugs: list[BaseException] = []

    def warm(self) -> None:
        """Each engine stores documents that the other does not have yet."""
        threads = [
            threading.Thread(target=self._store_some, args=(index,))
            for index in range(len(self.engines))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def start(self) -> None:
        self._stopping.clear()
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"load-{index}", daemon=True)
            for index in range(len(self.engines))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when no request is under way. start() goes on."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(STOP_LIMIT_S)
            assert not thread.is_alive(), f"{thread.name} hangs"
        if self._bugs:
            raise self._bugs[0]

    def excuse(self, engine: Engine) -> None:
        """The engine is about to be killed: what it does not answer is not counted."""
        self._excused.add(engine)

    def snapshot(self) -> list[Outcome]:
        with self._lock:
            return list(self.outcomes)

    def since(self, moment_s: float) -> list[Outcome]:
        """Requests that began at or after a moment."""
        return [outcome for outcome in self.snapshot() if outcome.began_s >= moment_s]

    def _store_some(self, index: int) -> None:
        for _ in range(STOCK):
            self._request(index, Kind.NEW)

    def _run(self, index: int) -> None:
        try:
            for kind in itertools.cycle(self._turns):
                self._request(index, kind)
                if self._stopping.wait(self._think_s):
                    return
        except BaseException as exc:
            self._bugs.append(exc)
            raise

    def _request(self, index: int, kind: Kind) -> None:
        with self._lock:
            kind, document = self.library.choose(index, kind)
        engine = self.engines[index]
        result: dict[str, Any]
        began_s = time.monotonic()
        try:
            answer = engine.call(
                fault_engine.ask,
                self.library.prompts[document.index],
                document.salt,
                ANSWER_TOKENS,
                limit_s=REQUEST_LIMIT_S,
            )
        except EngineError as exc:
            excused = engine in self._excused
            result = {"failed": not excused, "excused": excused, "problem": str(exc)}
        else:
            taken = ("local", "peer", "stored", "cached_tokens", "wait_ms")
            result = {name: answer[name] for name in taken} | {
                "failed": answer["finish_reason"] != "length",
                "wrong": answer["tokens"] != self.library.controls[document.index],
            }
        outcome = Outcome(
            engine=index,
            kind=kind,
            document=document,
            began_s=began_s,
            ended_s=time.monotonic(),
            **result,
        )
        if outcome.problem:
            time.sleep(AFTER_ERROR_S)
        with self._lock:
            self.outcomes.append(outcome)
            if not (outcome.failed or outcome.excused):
                self.library.note(index, kind, document)


def counted(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if not outcome.excused]
