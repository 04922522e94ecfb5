"""How fast this engine computes a prompt, measured step by step. No vLLM, no clock here.

    step_begins(tokens) ... step_ends()      steps may overlap: vLLM schedules the next one early

kvray.core.break_even weighs a fetch against it.
"""

from collections import deque

MIN_STEP_TOKENS = 128  # a step with fewer is mostly decoding: its time says nothing about prefill
MAX_KEPT_TOKENS = 65_536  # about as many prompts' worth as a change of load takes to show
MAX_STEPS_UNDER_WAY = 16  # vLLM schedules one or two ahead; a step that was dropped falls out here


class PrefillRate:
    """The mean over the last MAX_KEPT_TOKENS or so, of steps that are mostly prefill."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[int, float]] = deque(maxlen=MAX_STEPS_UNDER_WAY)
        self._last_end_s = 0.0
        self._tokens = 0
        self._seconds = 0.0
        self.total_tokens = 0  # of all that was ever measured: whoever looks now and then has a
        self.total_us = 0  # rate of his own, as the difference of two looks

    @property
    def us_per_token(self) -> float:
        """0.0 until a prompt has been computed."""
        return self._seconds / self._tokens * 1e6 if self._tokens else 0.0

    @property
    def tokens_per_s(self) -> int:
        """The same, for people."""
        return round(self._tokens / self._seconds) if self._seconds else 0

    def step_begins(self, tokens: int, now_s: float) -> None:
        """tokens: of all requests in it. A step without any is not run."""
        if tokens:
            self._under_way.append((tokens, now_s))

    def step_ends(self, now_s: float) -> None:
        """The oldest step that has begun is over."""
        if not self._under_way:
            return
        tokens, begun_s = self._under_way.popleft()
        took_s = now_s - max(begun_s, self._last_end_s)
        self._last_end_s = now_s
        if tokens < MIN_STEP_TOKENS or took_s <= 0:
            return
        self.total_tokens += tokens
        self.total_us += round(took_s * 1e6)
        self._tokens += tokens
        self._seconds += took_s
        if self._tokens > MAX_KEPT_TOKENS:
            self._tokens //= 2
            self._seconds /= 2
