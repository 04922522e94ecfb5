"""Why a prompt was computed, on the real parts: each reason is made to happen and found under its
name in attachment.stats(), in status, and in what `kvray status --json` and the doctor say.

Method: two Ray nodes; engine A on the first computes, engine B on the second asks. The counters of
B before and after say what became of one prompt. Reasons that need a slow link are made to happen
in test_why_missed_slow_link.py, those that need a race with the real cores in
tests/unit/test_reasons.py.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from kvray.actors import RAY_NAMESPACE, directory_name
from kvray.core.reasons import MissReason, tokens_by_reason, tokens_by_source
from kvray.node.client import Reservation
from kvray.watch.doctor import Grade, diagnose, engines_in, verdict
from kvray.watch.tables import status_data
from kvray.watch.whereabouts import locate_prompt, one_engine
from tests import in_engine
from tests.block_client import Client
from tests.conftest import EngineFactory
from tests.engines import Engine
from tests.models import tiny
from tests.prompts import CHUNK_TOKENS, full_chunks, prompt_of
from tests.ray_nodes import Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy, pytest.mark.engine]

TOKENS = 700
TAIL = TOKENS - full_chunks(TOKENS)
CHUNK_BYTES = 1 << 20  # of the tiny model


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2) as running:
        yield running


@pytest.fixture(scope="module")
def engines(nodes: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    seeded = {"PYTHONHASHSEED": "0"}
    a, b = (
        shared_engine_factory(tiny(), kv_transfer_config=nodes.transfer(index), environment=seeded)
        for index in (0, 1)
    )
    return a.ready(), b.ready()


class Asked:
    """What the counters of an engine have grown by."""

    def __init__(self, before: dict[str, int], after: dict[str, int]) -> None:
        grown = {name: count - before.get(name, 0) for name, count in after.items()}
        self.sources = tokens_by_source([grown])
        self.reasons = tokens_by_reason([grown])


def ask(engine: Engine, prompt: list[int]) -> Asked:
    before = engine.call(in_engine.settle)["counters"]
    engine.generate(prompt)
    return Asked(before, engine.call(in_engine.settle)["counters"])


def computed(engine: Engine, nodes: Nodes, index: int, *, seed: int) -> list[int]:
    """A prompt that this engine has computed and stored, and that the directory knows."""
    prompt = prompt_of(TOKENS, seed=seed)
    engine.generate(prompt)
    engine.call(in_engine.settle)
    nodes.wait_listed(nodes.keys(index))
    return prompt


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def directory_pid(nodes: Nodes) -> int:
    directory: Any = ray.get_actor(directory_name(nodes.cluster.name), namespace=RAY_NAMESPACE)
    pid: int = ray.get(directory.pid.remote())
    return pid


def test_what_a_peer_has_is_counted_as_its_and_the_tail_could_not_be_had(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    asked = ask(b, computed(a, nodes, 0, seed=1))
    assert asked.sources == {
        "device": 0,
        "local": 0,
        "peer": full_chunks(TOKENS),
        "computed": TAIL,
    }
    assert asked.reasons == {MissReason.TAIL: TAIL}


def test_the_same_prompt_again_is_on_the_device_and_then_in_the_nodes_own_slab(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    a, b = engines
    prompt = computed(a, nodes, 0, seed=2)
    ask(b, prompt)
    again = ask(b, prompt)
    assert again.sources["device"] + again.sources["computed"] == TOKENS
    assert again.sources["device"] >= full_chunks(TOKENS) - CHUNK_TOKENS

    assert b.reset_prefix_cache()
    assert ask(b, prompt).sources["local"] == full_chunks(TOKENS)


def test_where_knows_the_chunks_by_their_tokens_alone(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    prompt = computed(engines[0], nodes, 0, seed=20)
    engine = one_engine(engines_in(nodes.cluster.status()), str(tiny()))
    found = locate_prompt(nodes.cluster, engine, [*prompt[:-TAIL], *prompt_of(400, seed=21)])
    assert found["chunk_tokens"] == CHUNK_TOKENS
    assert found["prefix_tokens"] == full_chunks(TOKENS)
    assert found["chunks"] == (full_chunks(TOKENS) + 400) // CHUNK_TOKENS
    (row,) = found["nodes"]
    assert row["node"] == nodes.node_ids[0]
    assert row["prefix_tokens"] == full_chunks(TOKENS)


def test_never_seen(engines: tuple[Engine, Engine]) -> None:
    asked = ask(engines[1], prompt_of(TOKENS, seed=3))
    assert asked.reasons == {MissReason.NEVER_SEEN: full_chunks(TOKENS), MissReason.TAIL: TAIL}


def test_evicted_here_and_at_the_peer(nodes: Nodes, engines: tuple[Engine, Engine]) -> None:
    a, b = engines
    prompt = computed(a, nodes, 0, seed=4)
    canary = {bytes.fromhex(key) for key in a.call(in_engine.canary_keys)}
    keys = [key for key in nodes.keys(0) if key not in canary]
    nodes.cluster.clear()
    wait_until(
        lambda: not any(nodes.cluster.where(*keys)), what="the announcement of what was evicted"
    )
    assert ask(b, prompt).reasons[MissReason.EVICTED] == full_chunks(TOKENS)


def test_slab_full(nodes: Nodes, engines: tuple[Engine, Engine]) -> None:
    a, b = engines
    prompt = computed(a, nodes, 0, seed=5)
    hog = Client(nodes.cluster, nodes.node_ids[1], "a hog", block_bytes=CHUNK_BYTES)
    held: list[Reservation] = []
    try:
        while True:  # until every slot is being written
            keys = hog.keys(*(f"{len(held)} {i}" for i in range(8)))
            hog.client.begin_step()
            reserved = hog.client.reserve(keys, run_lengths=[8], run_slot_bytes=[CHUNK_BYTES])
            assert reserved is not None
            if not reserved.places:
                break
            held.append(reserved)
        assert ask(b, prompt).reasons[MissReason.SLAB_FULL] == full_chunks(TOKENS)
    finally:
        for reserved in held:
            hog.client.abandon(reserved.slab_id, list(reserved.places.values()))
        hog.client.close()


def test_directory_silent_or_deadline(nodes: Nodes, engines: tuple[Engine, Engine]) -> None:
    """A directory that is frozen: the first look-up may wait for it, and what follows knows."""
    a, b = engines
    prompt = computed(a, nodes, 0, seed=6)
    with frozen(directory_pid(nodes)):
        (reason,) = set(ask(b, prompt).reasons) - {MissReason.TAIL}
    assert reason in (MissReason.DIRECTORY_SILENT, MissReason.DEADLINE)


def test_status_says_what_the_engines_have_said(
    nodes: Nodes, engines: tuple[Engine, Engine]
) -> None:
    counters = [engine.call(in_engine.settle)["counters"] for engine in engines]
    wait_until(
        lambda: nodes.cluster.status().hit_tokens == tokens_by_source(counters),
        what="the engines' reports",
    )
    status = nodes.cluster.status()
    data = status_data(status)
    assert data["miss_tokens"] == status.miss_tokens == tokens_by_reason(counters)
    assert {"never_seen", "evicted", "slab_full", "tail"} <= data["miss_tokens"].keys()
    assert data["nodes"][0]["models"] == [str(tiny())]
    assert data["fetched_bytes"] > 0
    assert verdict(status).startswith("kvray will share between ")
    assert not [f for f in diagnose(status) if f.grade is Grade.BAD]


@pytest.mark.parametrize(
    ("seed", "settings", "field", "advice"),
    [
        ("1", {}, "hash_seed", "PYTHONHASHSEED"),
        ("0", {"chunk_tokens": 2 * CHUNK_TOKENS}, "blocks_per_chunk", "chunk_tokens"),
    ],
    ids=["hash seed", "chunk size"],
)
def test_namespace_differs_and_the_doctor_names_the_field(
    nodes: Nodes,
    engines: tuple[Engine, Engine],
    engine_factory: EngineFactory,
    *,
    seed: str,
    settings: dict[str, Any],
    field: str,
    advice: str,
) -> None:
    a, _ = engines
    other = engine_factory(
        tiny(),
        kv_transfer_config=nodes.transfer(1, **settings),
        environment={"PYTHONHASHSEED": seed},
    ).ready()
    prompt = computed(a, nodes, 0, seed=7)
    wait_until(
        lambda: nodes.cluster.status().split_models == (str(tiny()),), what="word of two namespaces"
    )
    wait_until(
        lambda: MissReason.NAMESPACE_DIFFERS in ask(other, prompt_of(TOKENS, seed=8)).reasons,
        what="word of it at the node",
    )
    whole_chunks = TOKENS // settings.get("chunk_tokens", CHUNK_TOKENS)
    differs = whole_chunks * settings.get("chunk_tokens", CHUNK_TOKENS)
    assert ask(other, prompt).reasons[MissReason.NAMESPACE_DIFFERS] == differs
    bad = [f.text for f in diagnose(nodes.cluster.status()) if f.grade is Grade.BAD]
    assert len(bad) == 1
    assert field in bad[0]
    assert advice in bad[0]


def test_peer_gone(nodes: Nodes, engines: tuple[Engine, Engine]) -> None:
    """The last one: node A leaves, and B has nobody to ask any more."""
    a, b = engines
    prompt = computed(a, nodes, 0, seed=9)
    nodes.cluster.clear()
    nodes.cluster.drain(nodes.node_ids[0])
    wait_until(
        lambda: nodes.status(1)["announcing"]["peers"] == 0, what="word that the peer has left"
    )
    assert ask(b, prompt).reasons[MissReason.PEER_GONE] == full_chunks(TOKENS)
