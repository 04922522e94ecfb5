"""Real vLLM engines for tests, each in a process group of its own.

    test ──JSON lines over a socketpair──▶ python -m tests.engine_process ──▶ LLM or AsyncLLM

    engine = start_engine(tiny(), folder=tmp_path)      returns at once
    answer = engine.generate(token_ids, max_tokens=8)   waits until the engine is up
    engine.close()

Started in one process with the engine (`Mode.IN_PROCESS`, up in about 8 s), as users do
(`Mode.MULTIPROCESS`: client, EngineCore and workers, 20 s) or as an AsyncLLM (`Mode.ASYNC`).
"""

import contextlib
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from tests.processes import ProcessGroup

ROOT = Path(__file__).resolve().parent.parent

READY_LIMIT_S = 180.0  # a multiprocess engine takes 20 s here, three times that beside other work
REQUEST_LIMIT_S = 120.0  # 6000 tokens of the tiny model take 6 s cold on two cores
WAITING_LIMIT_S = 60.0  # to see that no request waits; the engine itself takes 4 s at most
CLOSE_LIMIT_S = 15.0  # vLLM ends its processes within 5 s
KV_CACHE_BYTES = 128 << 20  # 128 blocks of the tiny model: 16,384 tokens
MAX_MODEL_TOKENS = 8_192


class Mode(Enum):
    IN_PROCESS = "in-process"
    MULTIPROCESS = "multiprocess"
    ASYNC = "async"


class EngineError(Exception):
    """The engine did not start, ended, or raised; the text has its traceback or its log's end."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request gave."""

    tokens: list[int]
    cached_tokens: int  # num_cached_tokens: from the device's prefix cache and from kvray
    ttft_ms: float
    finish_reason: str


class Engine:
    """One engine of a test. Its methods block; several engines may be used from several threads."""

    def __init__(self, group: ProcessGroup, channel: socket.socket, mode: Mode) -> None:
        self.group = group
        self.mode = mode
        self.startup_s = 0.0  # set by ready()
        self._channel = channel
        self._answers = channel.makefile("rb")
        self._is_ready = False
        self._may_serve = True
        self._call_count = 0

    @property
    def is_serving(self) -> bool:
        """It is up, and has answered whatever it was asked."""
        return self._is_ready and self._may_serve and bool(self.group.members())

    def ready(self) -> "Engine":
        """Waits until the engine is up. Every other method does so by itself."""
        if not self._is_ready:
            self.startup_s = self._receive(0, limit_s=READY_LIMIT_S)["startup_s"]
            self._is_ready = True
        return self

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 1,
        cache_salt: str | None = None,
        lora: tuple[str, int, Path] | None = None,
        limit_s: float = REQUEST_LIMIT_S,
    ) -> Answer:
        """Greedy decoding of one prompt. lora: name, id, folder."""
        [answer] = self.generate_many(
            [prompt], max_tokens=max_tokens, cache_salt=cache_salt, lora=lora, limit_s=limit_s
        )
        return answer

    def generate_many(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int = 1,
        cache_salt: str | None = None,
        lora: tuple[str, int, Path] | None = None,
        limit_s: float = REQUEST_LIMIT_S,
    ) -> list[Answer]:
        """All prompts at the same time, as one batch; answers in their order."""
        found = self._ask(
            "generate",
            limit_s=limit_s,
            prompts=[list(prompt) for prompt in prompts],
            max_tokens=max_tokens,
            cache_salt=cache_salt,
            lora=None if lora is None else [lora[0], lora[1], str(lora[2])],
        )
        return [Answer(**fields) for fields in found]

    def reset_prefix_cache(
        self, *, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return bool(
            self._ask(
                "reset_prefix_cache",
                reset_running_requests=reset_running_requests,
                reset_connector=reset_connector,
            )
        )

    def collective_rpc(self, method: str, *arguments: Any, limit_s: float = REQUEST_LIMIT_S) -> Any:
        """A method of the workers, by name; one result per rank, as JSON."""
        return self._ask("collective_rpc", limit_s=limit_s, method=method, arguments=arguments)

    def call(
        self, function: Callable[..., Any], *arguments: Any, limit_s: float = REQUEST_LIMIT_S
    ) -> Any:
        """function(llm, *arguments) in the engine's client process; its result must be JSON.

        function: a module's own, also a coroutine function for an AsyncLLM. The module is imported
        there, so a test module may hold it.
        """
        assert "." not in function.__qualname__, "only a function of a module can be named"
        name = f"{function.__module__}:{function.__qualname__}"
        return self._ask("call", limit_s=limit_s, function=name, arguments=arguments)

    def processes(self) -> list[int]:
        """The pids of client, EngineCore and workers that are alive."""
        return self.group.members()

    def ask_to_end(self) -> None:
        """Lets the engine end as its owner would; close() waits for it. Ending takes vLLM 3 to 7 s,
        so whoever has several asks all of them first."""
        if self._may_serve and self.group.members():
            with contextlib.suppress(OSError):  # it has ended already
                self._send({"id": -1, "op": "end"})
        self._may_serve = False

    def close(self) -> None:
        """Ends the engine, and then whatever is left of it. May be repeated."""
        self.ask_to_end()
        self.group.wait(limit_s=CLOSE_LIMIT_S)
        self.group.end()
        self._answers.close()
        self._channel.close()

    def kill(self) -> None:
        """SIGKILL to all its processes at once."""
        self._may_serve = False
        self.group.kill()

    def _ask(self, operation: str, *, limit_s: float = REQUEST_LIMIT_S, **fields: Any) -> Any:
        self.ready()
        self._call_count += 1
        call_id = self._call_count
        try:
            self._send({"id": call_id, "op": operation, **fields})
        except OSError as exc:
            raise EngineError(self._story("has ended")) from exc
        return self._receive(call_id, limit_s=limit_s)

    def _send(self, message: Mapping[str, Any]) -> None:
        self._channel.sendall(json.dumps(message).encode() + b"\n")

    def _receive(self, call_id: int, *, limit_s: float) -> Any:
        self._channel.settimeout(limit_s)
        try:
            line = self._answers.readline()
        except TimeoutError as exc:
            self._may_serve = False
            raise EngineError(self._story(f"did not answer within {limit_s:.0f} s")) from exc
        except ConnectionResetError:  # it was killed with a request unread
            line = b""
        if not line:
            self._may_serve = False
            raise EngineError(self._story("has ended"))
        answer = json.loads(line)
        assert answer["id"] == call_id
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["result"]

    def _story(self, what: str) -> str:
        return f"engine {self.group.pgid} {what}; the end of {self.group.log}:\n" + (
            self.group.log_tail()
        )


def assert_nothing_waits(engine: Engine) -> None:
    """No request of it is unfinished, and no device block is lost."""
    from tests import in_engine

    look = {
        Mode.IN_PROCESS: in_engine.waiting,
        Mode.MULTIPROCESS: in_engine.waiting_elsewhere,
        Mode.ASYNC: in_engine.waiting_elsewhere_async,
    }
    found = engine.call(look[engine.mode], limit_s=WAITING_LIMIT_S)
    assert found == {"requests": [], "device_blocks": 0}, f"{engine.group.log}: {found}"


def start_engine(
    model: Path,
    *,
    folder: Path,
    mode: Mode = Mode.IN_PROCESS,
    environment: Mapping[str, str] | None = None,
    within: Callable[..., Sequence[str]] = lambda *words: words,
    **arguments: Any,
) -> Engine:
    """Returns while the engine is still starting, so that several can start side by side.

    folder: for its log. environment: on top of what the mode needs; within: makes of a command the
    one that runs it elsewhere; arguments: of vllm.LLM, on top of what makes a small engine start
    fast. The caller closes the engine.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        settings = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "dtype": "bfloat16",
            "max_model_len": MAX_MODEL_TOKENS,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            "disable_log_stats": False,  # otherwise there is no time of the first token
            "seed": 0,
            **arguments,
        }
        number = len(list(folder.glob("engine-*.log")))
        group = ProcessGroup(
            within(
                sys.executable,
                "-m",
                "tests.engine_process",
                str(theirs.fileno()),
                mode.value,
                json.dumps(settings),
            ),
            environment=engine_environment(mode, environment or {}),
            log=folder / f"engine-{number}.log",
            pass_fds=[theirs.fileno()],
        )
    return Engine(group, ours, mode)


def engine_environment(mode: Mode, extra: Mapping[str, str]) -> dict[str, str]:
    """What an engine on two cores needs to be fast, and to ask nobody outside."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        # Named cores: with a connector vLLM would else bind its worker to other ones than without.
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
    }
    if mode is Mode.IN_PROCESS:
        # What vLLM does for its worker processes and can not do in a process that already runs.
        environment |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(len(cores)),
            "LD_PRELOAD": _libgomp(),
        }
    return environment | dict(extra)


def _libgomp() -> str:
    """torch's own OpenMP library: without it one core only is used well."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch_folder = Path(spec.submodule_search_locations[0])
    [library] = torch_folder.glob("lib/libgomp*.so*")
    return str(library)
