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
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.engines.audit_world import (
    DIFFERENT,
    EQUAL,
    VERDICT_LIMIT_S,
    Scene,
    ask_all,
    counters_of,
    ending,
    is_same_maker,
    loaded_tokens,
    verdict,
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
PACKING, WEIGHT = "another packing", "another weight"
ITS_OWN, OF_A = "its own", "A's"
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
    """One engine that computes something else. names: ITS_OWN or OF_A. verdict: of its node on
    A; None if the two have not even met.
    """

    case: str
    names: str
    verdict: str | None
    loaded_before_verdict: int
    loaded_tokens: int
    wrong_answers: int

    @property
    def is_kept_apart(self) -> bool:
        """Found before a load where the names are equal, never met where they are not."""
        expected = DIFFERENT if self.names == OF_A else None
        return self.verdict == expected and not (self.loaded_tokens or self.loaded_before_verdict)

    def to_row(self) -> dict[str, object]:
        return asdict(self)


def meet_its_like(
    stage: Scene, a: Engine, documents: Sequence[list[int]], controls: Sequence[Answer]
) -> Like:
    with ending(b := stage.start(stage.nodes, 1)):
        begun_s = time.monotonic()
        wait_until(
            lambda: is_same_maker(b, a) or verdict(stage.nodes, b, a) == EQUAL,
            what="trust in its like",
            limit_s=VERDICT_LIMIT_S,
        )
        trusted_s = time.monotonic() - begun_s
        answers = ask_all(b, documents[:1])
        missed = tokens_by_reason([counters_of(b)])
        missed.pop(MissReason.TAIL, None)
        answers += ask_all(b, documents[1:])
        return Like(
            is_same_maker=is_same_maker(b, a),
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
    one, two = (stage.start(stage.nodes, 1, **kind) for kind in (packing, weight))
    with ending(one, two):
        others, own = (ask_all(engine, documents) for engine in (one, two))
        assert wrong(own, controls), "this weight changes no answer: nothing would be seen"
        rows = [
            _row(stage, a, b, case, ITS_OWN, loaded_first=0, wrong_answers=count)
            for b, case, count in ((one, PACKING, wrong(others, controls)), (two, WEIGHT, 0))
        ]
    facts = a.call(in_engine.fields)
    told = {"environment": {VARIABLE: json.dumps({name: facts[name] for name in FACTS})}}
    for case, kind, expected in ((PACKING, packing, controls), (WEIGHT, weight, own)):
        with ending(b := stage.start(stage.nodes, 1, **kind, **told)):
            # The first question comes as soon as it is up, whatever has been compared by then.
            answers = ask_all(b, documents[:1])
            wait_verdict(stage.nodes, b, a)
            first = loaded_tokens(counters_of(b))
            answers += ask_all(b, documents[1:])
            count = wrong(answers, expected)
            rows.append(_row(stage, a, b, case, OF_A, loaded_first=first, wrong_answers=count))
    return rows


def _row(
    stage: Scene,
    a: Engine,
    b: Engine,
    case: str,
    names: str,
    *,
    loaded_first: int,
    wrong_answers: int,
) -> Other:
    """All has been asked."""
    spaces = [engine.call(in_engine.stats)["namespace"] for engine in (a, b)]
    assert (spaces[0] == spaces[1]) == (names == OF_A), "the names are not those of this case"
    return Other(
        case,
        names,
        verdict=verdict(stage.nodes, b, a),
        loaded_before_verdict=loaded_first,
        loaded_tokens=loaded_tokens(counters_of(b)),
        wrong_answers=wrong_answers,
    )
