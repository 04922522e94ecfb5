"""The process of one test engine: `python -m tests.engine_process FD MODE SETTINGS`.

Reads one JSON object per line from the socket FD, does it, answers with one line. See
tests/engines.py. When the other end of the socket is gone, so is the test: the process then kills
its whole group, EngineCore and workers included, whatever it is doing.
"""

import asyncio
import importlib
import inspect
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any

ENABLE_VARIABLE = "KVRAY_TEST_ENABLE"  # kvray.enable's settings, as JSON


class Llm:
    """vllm.LLM, which blocks: the engine runs in this process or in children."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        self.engine = LLM(**settings)

    def generate(self, requests: Sequence["_Request"], lora: Any) -> list[Any]:
        found: list[Any] = self.engine.generate(
            [request.prompt for request in requests],
            [request.sampling for request in requests],
            lora_request=lora,
            use_tqdm=False,
        )
        return found

    def call(self, method: Any, *arguments: Any, **options: Any) -> Any:
        return method(*arguments, **options)

    def end(self) -> None:
        core = self.engine.llm_engine.engine_core
        core.shutdown()


class AsyncLlm:
    """vllm's AsyncLLM, in an event loop of its own thread, as a server has it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="loop", daemon=True).start()
        self.engine = self.call(self._create, settings)

    def generate(self, requests: Sequence["_Request"], lora: Any) -> list[Any]:
        found: list[Any] = self.call(self._generate_all, requests, lora)
        return found

    def call(self, method: Any, *arguments: Any, **options: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(
            self._awaited(method, *arguments, **options), self._loop
        ).result()

    def end(self) -> None:
        self.call(self.engine.shutdown)

    @staticmethod
    async def _create(settings: dict[str, Any]) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        quiet = settings.pop("disable_log_stats")
        arguments = AsyncEngineArgs(**settings, disable_log_stats=quiet)
        return AsyncLLM.from_engine_args(arguments)

    async def _generate_all(self, requests: Sequence["_Request"], lora: Any) -> list[Any]:
        return await asyncio.gather(*(self._generate(request, lora) for request in requests))

    async def _generate(self, request: "_Request", lora: Any) -> Any:
        last = None
        answers = self.engine.generate(
            request.prompt, request.sampling, request.name, lora_request=lora
        )
        async for output in answers:
            last = output
        return last

    @staticmethod
    async def _awaited(method: Any, *arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        return await result if inspect.isawaitable(result) else result


class _Request:
    """One prompt as vLLM wants it: the whole output in one piece, of exactly max_tokens tokens."""

    _count = 0

    def __init__(self, prompt: list[int], *, max_tokens: int, cache_salt: str | None) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        _Request._count += 1
        self.name = f"request-{_Request._count}"
        self.prompt: dict[str, Any] = {"prompt_token_ids": prompt}
        if cache_salt is not None:
            self.prompt["cache_salt"] = cache_salt
        self.sampling = SamplingParams(
            temperature=0.0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _perform(llm: Llm | AsyncLlm, request: dict[str, Any]) -> Any:
    operation = request["op"]
    if operation == "generate":
        return _generate(llm, request)
    if operation == "reset_prefix_cache":
        return llm.call(
            llm.engine.reset_prefix_cache,
            reset_running_requests=request["reset_running_requests"],
            reset_connector=request["reset_connector"],
        )
    if operation == "collective_rpc":
        return llm.call(
            llm.engine.collective_rpc, request["method"], args=tuple(request["arguments"])
        )
    assert operation == "call", operation
    module, name = request["function"].split(":")
    function = getattr(importlib.import_module(module), name)
    return llm.call(function, llm.engine, *request["arguments"])


def _generate(llm: Llm | AsyncLlm, request: dict[str, Any]) -> list[dict[str, Any]]:
    requests = [
        _Request(prompt, max_tokens=request["max_tokens"], cache_salt=request["cache_salt"])
        for prompt in request["prompts"]
    ]
    outputs = llm.generate(requests, _lora(request["lora"]))
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "cached_tokens": output.num_cached_tokens or 0,
            "ttft_ms": output.metrics.first_token_latency * 1000,
            "finish_reason": str(output.outputs[0].finish_reason),
        }
        for output in outputs
    ]


def _lora(fields: list[Any] | None) -> Any:
    if fields is None:
        return None
    from vllm.lora.request import LoRARequest

    name, number, folder = fields
    return LoRARequest(name, number, folder)


def _read_requests(channel: socket.socket, requests: "queue.SimpleQueue[dict[str, Any]]") -> None:
    with channel.makefile("rb") as lines:
        for line in lines:
            requests.put(json.loads(line))
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _enable(settings: str | None) -> None:
    """kvray.enable as a user calls it, before the engine is made."""
    if settings is not None:
        import kvray

        kvray.enable(**json.loads(settings))


def main() -> None:
    started = time.monotonic()
    channel = socket.socket(fileno=int(sys.argv[1]))
    os.set_inheritable(channel.fileno(), False)  # noqa: FBT003 (the standard library's)
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    reader = threading.Thread(target=_read_requests, args=(channel, requests), daemon=True)
    reader.start()

    def answer(call_id: int, **fields: Any) -> None:
        channel.sendall(json.dumps({"id": call_id, **fields}).encode() + b"\n")

    try:
        _enable(os.environ.get(ENABLE_VARIABLE))
        kind = AsyncLlm if sys.argv[2] == "async" else Llm
        llm = kind(json.loads(sys.argv[3]))
    except BaseException:
        answer(0, error=traceback.format_exc())
        raise
    answer(0, result={"startup_s": time.monotonic() - started})
    while (request := requests.get())["op"] != "end":
        try:
            result = _perform(llm, request)
            answer(request["id"], result=result)
        except Exception:  # noqa: BLE001 (the outermost loop: the test raises it again)
            answer(request["id"], error=traceback.format_exc())
    llm.end()


if __name__ == "__main__":
    main()
