"""The page of a real cluster in a real browser: what it shows is what `kvray status --json` says,
while two engines exchange blocks; and a node that is killed is red before anybody has asked.

Method: two Ray nodes, an engine on each; the page is served by its own actor, as `kvray start`
does it. Chromium looks at it; nothing is read from the page but what a person would see.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from playwright.sync_api import Page, expect

from kvray.core.reasons import tokens_by_source
from kvray.watch.page import open_page
from tests import in_engine
from tests.browser import DESK, LIMIT_MS, PICTURES, Browser, keep_picture, open_browser
from tests.conftest import EngineFactory
from tests.engines import ROOT, Engine
from tests.models import tiny
from tests.prompts import prompt_of
from tests.ray_nodes import READY_LIMIT_S, Nodes, running_nodes, wait_until

pytestmark = [pytest.mark.heavy]

TOKENS = 1_500
EXCHANGES = 40 if PICTURES in os.environ else 6  # a picture wants some history
RED_LIMIT_MS = 3_000
SOURCES = ("device", "local", "peer", "computed")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with running_nodes(2) as running:
        yield running


@pytest.fixture(scope="module")
def engines(nodes: Nodes, shared_engine_factory: EngineFactory) -> tuple[Engine, Engine]:
    a, b = (
        shared_engine_factory(
            tiny(),
            kv_transfer_config=nodes.transfer(index),
            environment={"PYTHONHASHSEED": "0", "VLLM_CPU_OMP_THREADS_BIND": str(index)},
        )
        for index in (0, 1)
    )
    return a.ready(), b.ready()


@pytest.fixture
def page(nodes: Nodes) -> Iterator[Page]:
    with open_browser() as browser:
        yield opened(browser, nodes)


def opened(browser: Browser, nodes: Nodes) -> Page:
    page = browser.open(open_page(nodes.cluster), DESK)
    expect(page.locator("#state")).to_have_text("live")
    expect(page.locator("[data-node]")).to_have_count(len(nodes.node_ids))
    return page


def shown_tokens(page: Page) -> dict[str, int]:
    """What the page says of each source now."""
    found: dict[str, str] = page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('[data-source]')]"
        ".map((one) => [one.dataset.source, one.dataset.tokens]))"
    )
    return {source: int(found[source]) for source in SOURCES}


def shown_reasons(page: Page) -> dict[str, int]:
    found: dict[str, str] = page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('[data-reason]')]"
        ".map((one) => [one.dataset.reason, one.dataset.tokens]))"
    )
    return {reason: int(tokens) for reason, tokens in found.items()}


def await_look(page: Page, *, since_s: float) -> None:
    """Until the page shows a status that is younger. `draw` works to its end before we look."""
    page.wait_for_function(
        "(since) => Number(document.getElementById('state').dataset.atS) > since", arg=since_s
    )


def typed_status(nodes: Nodes) -> dict[str, Any]:
    """`kvray status --json`, as a person types it."""
    done = subprocess.run(
        [sys.executable, "-m", "kvray.watch", "status", "--json"],
        capture_output=True,
        text=True,
        timeout=READY_LIMIT_S,
        env=os.environ | {"RAY_ADDRESS": nodes.ray_cluster.address, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Exchange(threading.Thread):
    """Each engine in turn computes a prompt, and the other one asks for it."""

    def __init__(self, engines: tuple[Engine, Engine]) -> None:
        super().__init__(name="exchange")
        self._engines = engines

    def run(self) -> None:
        for number in range(EXCHANGES):
            prompt = prompt_of(TOKENS, seed=100 + number)
            for turn in (0, 1):
                engine = self._engines[(number + turn) % 2]
                engine.generate(prompt)
                engine.call(in_engine.settle)


def test_while_two_engines_exchange_blocks_the_page_says_what_status_says(
    nodes: Nodes, engines: tuple[Engine, Engine], page: Page
) -> None:
    exchange = Exchange(engines)
    exchange.start()
    seen_traffic = 0
    compared = 0
    while exchange.is_alive():
        before = nodes.cluster.status().hit_tokens
        asked_s = time.time()
        await_look(page, since_s=asked_s)
        shown = shown_tokens(page)
        after = nodes.cluster.status().hit_tokens
        for source in SOURCES:
            assert before[source] <= shown[source] <= after[source], source
        compared += 1
        if page.locator("#traffic td").count() > 0:
            seen_traffic += 1
            keep_picture(page, "page")
    exchange.join()
    assert compared >= 3, "the exchange has ended before it could be watched"
    assert seen_traffic, "the traffic between the nodes was never shown"

    counters = [engine.call(in_engine.settle)["counters"] for engine in engines]
    wait_until(
        lambda: nodes.cluster.status().hit_tokens == tokens_by_source(counters),
        what="the engines' reports",
    )
    status = typed_status(nodes)
    await_look(page, since_s=time.time())
    assert shown_tokens(page) == status["hit_tokens"]
    assert status["hit_tokens"]["peer"] > 0
    assert shown_reasons(page) == status["miss_tokens"]
    assert page.url == status["page_url"]
    for node in status["nodes"]:
        card = page.locator(f"[data-node='{node['node']}']")
        expect(card).to_have_attribute("data-state", node["state"])
        expect(card).to_contain_text(f"{node['blocks']:,} blocks")
        expect(card).to_contain_text(Path(node["models"][0]).name)


def test_a_node_that_is_killed_turns_red_within_three_seconds(nodes: Nodes, page: Page) -> None:
    """Raylet and NodeStore at once, as when a host loses its power. The cluster is quiet, so its
    heartbeats are far apart.
    """
    victim = nodes.node_ids[1]
    card = page.locator(f"[data-node='{victim}']")
    expect(card).to_have_attribute("data-state", "ready")
    green = card.evaluate("card => getComputedStyle(card).borderLeftColor")
    (dead,) = (n for n in nodes.ray_cluster.list_all_nodes() if n.node_id == victim)
    pids = [dead.all_processes["raylet"][0].process.pid, nodes.status(1)["pid"]]
    red = page.evaluate(
        "() => { const probe = document.createElement('i');"
        " probe.style.color = 'var(--bad)'; document.body.append(probe);"
        " const colour = getComputedStyle(probe).color; probe.remove(); return colour; }"
    )
    assert green != red

    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    page.wait_for_function(
        "([node, red]) => getComputedStyle(document.querySelector(`[data-node='${node}']`))"
        ".borderLeftColor === red",
        arg=[victim, red],
        timeout=RED_LIMIT_MS,
    )

    page.locator(f"#events >> text=/{victim[:8]} (is silent|is gone)/").first.wait_for()
    page.locator(f"[data-node='{victim}'][data-state='lost']").wait_for(timeout=LIMIT_MS)
    keep_picture(page, "killed-node")
    assert page.locator("[data-node][data-state='ready']").count() == 1, "the other one goes on"
    replace_node(nodes, dead)
    expect(page.locator("[data-node][data-state='ready']")).to_have_count(2)


def replace_node(nodes: Nodes, dead: Any) -> None:
    """A new node takes over the slab that the dead one has left, so that nothing is."""
    node = nodes.ray_cluster.add_node(num_cpus=2)
    wait_until(
        lambda: node.node_id in {n.node_id for n in nodes.cluster.nodes()},
        what="the new node",
        limit_s=READY_LIMIT_S,
    )
    nodes.ray_cluster.remove_node(dead, allow_graceful=False)
    wait_until(
        lambda: dead.node_id not in {n["NodeID"] for n in ray.nodes() if n["Alive"]},
        what="Ray's death notice",
        limit_s=READY_LIMIT_S,
    )
