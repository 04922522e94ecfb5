"""The oracle: the KV of a hit, beside the KV that the same engine computes itself.

    oracle = Oracle(engine)                        an engine in one process, with kvray
    verdict = oracle.check(prompt, hit_tokens=896)

    fresh    with a cache_salt of its own: nothing is found, all is computed
    device   the same once more: vLLM's own prefix cache answers, and with it what the engine says
             at this number of cached tokens
    hit      without that salt, the device's cache emptied before: kvray answers, or nobody

Each block that kvray loads is compared with the block of `fresh`, as `kv_recorder` has seen them:
for each cache group, rank and layer. That kvray has answered is read from three counts: of its own
hit tokens, of vLLM's cached tokens, and of the loads that ended well.

Bytes must be equal where the arithmetic is the same: the stored block was computed in a prefill of
the same tokens, cut into the same steps. Elsewhere (a block that was decoded token by token, or
computed behind a hit) values are compared with a tolerance, which comes from this very engine: it
computes one prompt in one piece and again in two, and the largest difference of that, per layer and
relative to the layer's largest value, is its noise; at least one step of the dtype at that value,
which is what another sum may round to. A wrong arrangement is off by about 1.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import in_engine, kv_recorder
from tests.engines import Engine
from tests.kv_recorder import Origin
from tests.prompts import prompt_of

# How far a difference may be beyond the one that was seen as noise: that is the largest of some
# ten thousand values, and another prompt's largest is another one. In bfloat16 noise is 0.01.
NOISE_FACTOR = 4.0
NOISE_TOKENS = 600
# Of the first token's log-probability: of the tiny model in bfloat16 0.008 was seen.
LEAST_LOGPROB_NOISE = 0.01

Lora = tuple[str, int, Path]


@dataclass(frozen=True, slots=True)
class Told:
    """What an engine answered to one request."""

    tokens: list[int]
    logprobs: list[float]
    cached_tokens: int
    loads: int
    failed_loads: int


@dataclass(frozen=True, slots=True)
class Compared:
    """Blocks of one request beside those of another. errors: of each layer that differs."""

    blocks: int
    equal: int
    missing: list[list[int]]
    unequal: list[list[int]]
    errors: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True, slots=True)
class Noise:
    """How far an engine is from itself: of each layer, and of a first log-probability."""

    layers: dict[str, float]
    logprob: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """loaded: by kvray. after: what the request computed behind its hit."""

    loaded: Compared
    after: Compared
    fresh: Told
    hit: Told


class Oracle:
    """One engine under test."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine.ready()
        self.lora: Lora | None = None  # of the requests to come
        self.blocks = 0  # compared so far, by all checks
        self._numbers = itertools.count()
        self._noise: Noise | None = None
        engine.call(kv_recorder.watch)

    # ---- asking

    def ask(
        self,
        prompt: Sequence[int],
        *,
        name: str | None = None,
        max_tokens: int = 1,
        cache_salt: str | None = None,
    ) -> Told:
        """One request, recorded under its name; returns once its stores have ended."""
        name = name or self._name()
        self.add(prompt, name=name, max_tokens=max_tokens, cache_salt=cache_salt)
        return self.finish()[name]

    def add(
        self,
        prompt: Sequence[int],
        *,
        name: str,
        max_tokens: int = 1,
        cache_salt: str | None = None,
    ) -> None:
        """A request that nobody steps yet."""
        lora = None if self.lora is None else [*self.lora[:2], str(self.lora[2])]
        options = {"max_tokens": max_tokens, "cache_salt": cache_salt, "lora": lora}
        self.engine.call(kv_recorder.add, name, list(prompt), options)

    def finish(self) -> dict[str, Told]:
        """Until all requests have ended, and then their stores."""
        told = self.engine.call(kv_recorder.finish)
        self.engine.call(in_engine.settle)
        return {name: Told(**fields) for name, fields in told.items()}

    def forget_device(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.engine.reset_prefix_cache(), "the device's cache is in use"

    # ---- the comparison

    def check(
        self,
        prompt: Sequence[int],
        *,
        hit_tokens: int | None,
        max_tokens: int = 4,
        cache_salt: str | None = None,
        same_bytes: bool = True,
    ) -> Verdict:
        """Whoever stored this prompt, kvray must now answer hit_tokens of it, rightly. None:
        whatever it answers, and be it nothing.

        same_bytes: whether it was computed by the same arithmetic as this engine would compute it.
        """
        fresh, device, hit = (self._name() for _ in range(3))
        own_salt = fresh
        computed = self.ask(prompt, name=fresh, max_tokens=max_tokens, cache_salt=own_salt)
        assert (computed.cached_tokens, computed.loads) == (0, 0), "the control was no control"
        control = self.ask(prompt, name=device, max_tokens=max_tokens, cache_salt=own_salt)
        self.forget_device()
        before = self._counters()
        answer = self.ask(prompt, name=hit, max_tokens=max_tokens, cache_salt=cache_salt)
        after = self._counters()

        if hit_tokens is None:
            hit_tokens = answer.cached_tokens
        assert answer.cached_tokens == hit_tokens
        assert (answer.loads, answer.failed_loads) == (bool(hit_tokens), 0)
        assert after["hits"] - before["hits"] == hit_tokens
        assert after["failed_loads"] == before["failed_loads"]
        verdict = Verdict(
            self.compare_hit(hit, fresh),
            self.compare(hit, Origin.COMPUTED, fresh, Origin.COMPUTED),
            computed,
            answer,
        )
        self.assert_right(verdict.loaded, same_bytes=same_bytes)
        assert verdict.loaded.blocks or not hit_tokens, "a hit, and no block of it was seen"
        self.assert_right(verdict.after, same_bytes=False)
        self._assert_same_answer(answer, control, same_bytes=same_bytes)
        self.engine.call(kv_recorder.forget, [fresh, device, hit])
        return verdict

    def compare(self, name: str, origin: Origin, other: str, other_origin: Origin) -> Compared:
        """Blocks of two requests of this engine."""
        found = self.engine.call(kv_recorder.compare, name, origin.value, other, other_origin.value)
        compared = Compared(**found)
        self.blocks += compared.blocks
        return compared

    def compare_hit(self, hit: str, control: str) -> Compared:
        """What request `hit` has loaded, beside what request `control` has computed."""
        return self.compare(hit, Origin.LOADED, control, Origin.COMPUTED)

    def assert_right(self, compared: Compared, *, same_bytes: bool) -> None:
        """Equal byte for byte, or within the tolerance of each layer."""
        assert not compared.missing, f"never computed here: blocks {compared.missing}"
        if same_bytes:
            assert compared.equal == compared.blocks, (
                f"blocks {compared.unequal} have other bytes, off by {compared.worst:.3g}"
            )
        for layer, error in compared.errors.items():
            limit = NOISE_FACTOR * self.noise.layers[layer]
            assert error <= limit, f"{layer}: off by {error:.3g}, noise allows {limit:.3g}"

    @property
    def noise(self) -> Noise:
        """One prompt computed in one piece, and in two: measured once."""
        if self._noise is None:
            self._noise = self._measured_noise()
        return self._noise

    def at_rest(self) -> None:
        """Nothing is unfinished, and each block of the device is free again."""
        self.engine.call(kv_recorder.step_to_rest)
        self.engine.call(in_engine.settle)
        found = self.engine.call(kv_recorder.left_over)
        assert found == {"requests": [], "lost_blocks": 0, "pending": 0}

    # ---- private

    def _measured_noise(self) -> Noise:
        prompt = prompt_of(NOISE_TOKENS, seed=424_242)
        whole, half, rest = (self._name() for _ in range(3))
        one = self.ask(prompt, name=whole, cache_salt=whole)
        self.ask(prompt[: NOISE_TOKENS // 2], name=half, cache_salt=half)
        two = self.ask(prompt, name=rest, cache_salt=half)
        assert 0 < two.cached_tokens < NOISE_TOKENS // 2, "not computed in two pieces"
        compared = self.compare(rest, Origin.COMPUTED, whole, Origin.COMPUTED)
        layers: dict[str, float] = {}
        largest = 0.0  # a layer has the noise of the layers before it, too
        for layer, step in self.engine.call(kv_recorder.layers):
            largest = layers[layer] = max(largest, step, compared.errors.get(layer, 0.0))
        self.engine.call(kv_recorder.forget, [whole, half, rest])
        return Noise(layers, abs(one.logprobs[0] - two.logprobs[0]))

    def _assert_same_answer(self, answer: Told, control: Told, *, same_bytes: bool) -> None:
        """At the same number of cached tokens and from the same bytes the engine computes the very
        same. Elsewhere near ties may fall to the other side: then the first log-probability only.
        """
        if same_bytes and answer.cached_tokens == control.cached_tokens:
            assert answer.tokens == control.tokens
            assert answer.logprobs == control.logprobs
            return
        limit = NOISE_FACTOR * max(self.noise.logprob, LEAST_LOGPROB_NOISE)
        assert abs(answer.logprobs[0] - control.logprobs[0]) <= limit

    def _counters(self) -> dict[str, int]:
        counters: dict[str, Any] = self.engine.call(in_engine.stats)["counters"]
        hits = counters["hit_tokens_local"] + counters["hit_tokens_peer"]
        return {"hits": hits, "failed_loads": counters["failed_loads"]}

    def _name(self) -> str:
        return f"oracle{next(self._numbers)}"
