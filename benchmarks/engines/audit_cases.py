"""Engine B meets engine A's blocks: as its like, and as one that computes something else.

    its like           the same maker, if it computes the same bytes: nothing is to be compared
    another packing    it arranges a block's bytes otherwise, as a host without AMX beside one with
    another weight     one element of one projection of keys is another

The last two come under their own names, where they must not even meet, and under A's names, as if
nobody had thought of what they differ in: then nothing of A may be loaded.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.engines.audit_world import (
    VERDICT_LIMIT_S,
    Scene,
    Trust,
    ask_all,
    counters_of,
    ending,
    loaded_tokens,
    wait_verdict,
    wrong,
)
from kvray.core.reasons import MissReason, tokens_by_reason
from tests import in_engine
from tests.engines import Answer, Engine
from tests.loading import set_element
from tests.models import tiny
from tests.named_alike import FACTS, VARIABLE
from tests.ray_nodes import wait_until

CHANGED = "model.layers.0.self_attn.k_proj.weight"
EIGHT = b"\x00\x41"  # 8.0; the others are about 0.02


@dataclass(frozen=True, slots=True)
class Like:
    """trusted_after_s: from B's ready() until A's blocks count for it. first_cached_tokens: of the
    question that comes right then. first_missed: tokens of it that had to be computed, by
    the reason.
    """

    is_same_maker: bool
    trusted_after_s: float
    first_cached_tokens: int
    first_missed: dict[str, int]
    loaded_tokens: int
    wrong_answers: int


@dataclass(frozen=True, slots=True)
class Other:
    """One engine that computes something else. names: "its own" or "A's". verdicts: the canaries
    that its node has compared meanwhile.
    """

    case: str
    names: str
    verdicts: int
    different: int
    loaded_before_verdict: int
    loaded_tokens: int
    wrong_answers: int

    @property
    def is_kept_apart(self) -> bool:
        """Found before a load where the names are equal, never met where they are not."""
        if self.loaded_tokens or self.loaded_before_verdict:
            return False
        return self.different > 0 if self.names == "A's" else self.verdicts == 0

    def to_row(self) -> dict[str, object]:
        return asdict(self)


def meet_its_like(
    stage: Scene, a: Engine, documents: Sequence[list[int]], controls: Sequence[Answer]
) -> Like:
    maker = a.call(in_engine.canary)["maker"]
    before = Trust.of(stage.nodes)
    with ending(b := stage.start(stage.nodes, 1)):
        begun_s = time.monotonic()

        def trusts() -> bool:
            found = b.call(in_engine.canary)
            if found["state"] != "proven":
                return False
            return found["maker"] == maker or Trust.of(stage.nodes).equal > before.equal

        wait_until(trusts, what="trust in its like", limit_s=VERDICT_LIMIT_S)
        trusted_s = time.monotonic() - begun_s
        answers = ask_all(b, documents[:1])
        missed = tokens_by_reason([counters_of(b)])
        missed.pop(MissReason.TAIL, None)
        answers += ask_all(b, documents[1:])
        return Like(
            is_same_maker=b.call(in_engine.canary)["maker"] == maker,
            trusted_after_s=round(trusted_s, 3),
            first_cached_tokens=answers[0].cached_tokens,
            first_missed=missed,
            loaded_tokens=loaded_tokens(counters_of(b)),
            wrong_answers=wrong(answers, controls),
        )


def meet_others(
    stage: Scene, a: Engine, documents: Sequence[list[int]], controls: Sequence[Answer]
) -> list[Other]:
    """Those of another weight are asked under their own names first: what they answer then, all of
    it computed by themselves, is the control of what they answer under A's.
    """
    changed = shutil.copytree(tiny(), stage.folder / "changed")
    set_element(changed, CHANGED, EIGHT)
    packing = {"worker_extension_cls": "tests.other_packing.OtherPacking"}
    weight = {"worker_extension_cls": "tests.named_alike.NamedAlike", "model": changed}

    before = Trust.of(stage.nodes)
    one, two = (stage.start(stage.nodes, 1, **kind) for kind in (packing, weight))
    with ending(one, two):
        found = [ask_all(engine, documents) for engine in (one, two)]
        loaded = [loaded_tokens(counters_of(engine)) for engine in (one, two)]
        names = {engine.call(in_engine.stats)["namespace"] for engine in (a, one, two)}
    assert len(names) == 1 + len(found), "an engine that differs has a name of its own"
    assert wrong(found[1], controls), "this weight changes no answer: nothing would be seen"
    seen = Trust.of(stage.nodes)
    own = [
        Other(
            case,
            "its own",
            verdicts=seen.verdicts - before.verdicts,
            different=seen.different - before.different,
            loaded_before_verdict=0,
            loaded_tokens=tokens,
            wrong_answers=wrong(answers, expected),
        )
        for case, tokens, answers, expected in zip(
            ("another packing", "another weight"), loaded, found, (controls, found[1]), strict=True
        )
    ]
    facts = a.call(in_engine.fields)
    told = {"environment": {VARIABLE: json.dumps({name: facts[name] for name in FACTS})}}
    return [
        *own,
        _meet_under_its_names(
            stage, a, documents, controls, case="another packing", arguments=packing | told
        ),
        _meet_under_its_names(
            stage, a, documents, found[1], case="another weight", arguments=weight | told
        ),
    ]


def _meet_under_its_names(
    stage: Scene,
    a: Engine,
    documents: Sequence[list[int]],
    controls: Sequence[Answer],
    *,
    case: str,
    arguments: Mapping[str, Any],
) -> Other:
    """The first question comes as soon as it is up, whatever has been compared by then."""
    before = Trust.of(stage.nodes)
    with ending(b := stage.start(stage.nodes, 1, **arguments)):
        answers = ask_all(b, documents[:1])
        seen = wait_verdict(stage.nodes, before)
        first = loaded_tokens(counters_of(b))
        answers += ask_all(b, documents[1:])
        names = {engine.call(in_engine.stats)["namespace"] for engine in (a, b)}
        assert len(names) == 1, "they have the same names, as they were told to"
        return Other(
            case,
            "A's",
            verdicts=seen.verdicts - before.verdicts,
            different=seen.different - before.different,
            loaded_before_verdict=first,
            loaded_tokens=loaded_tokens(counters_of(b)),
            wrong_answers=wrong(answers, controls),
        )
