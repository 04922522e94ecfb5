"""The page as a browser shows it, for clusters that nobody has here: none yet, one node, fifty; on
a desk, on a phone and at night. The feed is made up, all else is real: server, page and Chromium.
"""

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from playwright.sync_api import Page, expect

from kvray.cluster import ClusterStatus, NodeState, NodeStatus
from kvray.watch.feed import POINT_S, Feed, page_data
from kvray.watch.page import LOOPBACK, PageServer
from tests.browser import DESK, NIGHT, PHONE, Browser, Look, is_too_wide, keep_picture, open_browser
from tests.statuses import cluster, engine, node

pytestmark = [pytest.mark.heavy]

MANY = 50
LOOKS = 24  # two minutes of history
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
# Some of fifty are not well; their places in the list.
ILL = {3: NodeState.SUSPECT, 17: NodeState.STARTING, 31: NodeState.LOST, 44: NodeState.DRAINED}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@contextmanager
def served(feed: Feed) -> Iterator[str]:
    server = PageServer(feed.snapshot, host=LOOPBACK, port=0)
    try:
        yield server.url
    finally:
        server.close()


def name_of(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()[:56]


def made_up(count: int, look: int) -> ClusterStatus:
    """The cluster at one look: what is counted grows, each node at its own pace."""
    nodes: list[NodeStatus] = []
    for number in range(count):
        totals = {
            f"hit_tokens_{source}": look * share * (900 + 37 * number)
            for source, share in (("device", 2), ("local", 3), ("peer", 4))
        }
        computed = look * (1_500 + 400 * (look % 7))
        totals |= {
            "computed_tokens": computed,
            "miss_tokens_never_seen": computed - look * 300,
            "miss_tokens_tail": look * 200,
            "miss_tokens_evicted": look * 100,
        }
        peers = {
            name_of(other): look * (number * other % 11) * 40_000_000
            for other in range(count)
            if other != number and (number + other) % 4 == 0
        }
        state = ILL.get(number, NodeState.READY) if look == LOOKS - 1 else NodeState.READY
        one = node("x", engine(MODEL, pid=number), state=state, totals=totals, from_peers=peers)
        used_bytes = one.slab_bytes * (30 + 13 * number % 65) // 100
        occupied = used_bytes >> 20
        if one.details:
            one.details["store"]["classes"] = [
                {"slot_bytes": 1 << 20, "slots": 700, "occupied": occupied * 3 // 4, "busy": 0},
                {"slot_bytes": 1 << 18, "slots": 1_200, "occupied": occupied, "busy": 2},
            ]
        nodes.append(
            replace(
                one,
                node_id=name_of(number),
                host=f"gpu-{number:02}",
                used_bytes=used_bytes if one.details else 0,
                block_count=2 * occupied,
            )
        )
    return cluster(*nodes)


def feed_of(count: int) -> Feed:
    """The last status is of now, so that the browser finds it fresh."""
    feed = Feed()
    for look in range(LOOKS):
        at_s = time.time() - POINT_S * (LOOKS - 1 - look)
        feed.add(at_s, page_data(made_up(count, look)))
    return feed


def cards(page: Page, state: str = "") -> int:
    return page.locator(f"[data-node]{f'[data-state={state}]' if state else ''}").count()


def test_before_there_is_anything_to_show_it_says_so(browser: Browser) -> None:
    with served(Feed()) as url:
        page = browser.open(url)
        expect(page.locator("#state")).to_have_text("waiting for the first status")
        expect(page.locator("#nodes")).to_have_text("no node has been seen yet")
        expect(page.locator("#legend")).to_contain_text("no history yet")
        page.close()


def test_a_cluster_without_nodes_and_one_with_a_single_node(browser: Browser) -> None:
    feed = Feed()
    feed.add(1.0, page_data(cluster()))
    with served(feed) as url:
        page = browser.open(url)
        expect(page.locator("[data-total='nodes that serve']")).to_contain_text("0 of 0")
        page.close()
    with served(feed_of(1)) as url:
        page = browser.open(url)
        expect(page.locator("[data-total='nodes that serve']")).to_contain_text("1 of 1")
        expect(page.locator("#traffic")).to_contain_text("no block is moving")
        page.close()


@pytest.mark.parametrize("look", [DESK, NIGHT, PHONE], ids=["desk", "night", "phone"])
def test_fifty_nodes(browser: Browser, look: Look, request: pytest.FixtureRequest) -> None:
    feed = feed_of(MANY)
    with served(feed) as url:
        page = browser.open(url, look)
        expect(page.locator("[data-node]")).to_have_count(MANY)
        assert cards(page, "ready") == MANY - len(ILL)
        for state in ILL.values():
            assert cards(page, state.value) == 1
        red, green = (
            page.locator(f"[data-state={state}]").first.evaluate(
                "card => getComputedStyle(card).borderLeftColor"
            )
            for state in ("lost", "ready")
        )
        assert red != green
        latest = feed.snapshot()["latest"]
        for source, tokens in latest["hit_tokens"].items():
            shown = page.locator(f"[data-source={source}]").get_attribute("data-tokens")
            assert shown == str(tokens)
        assert len(latest["miss_tokens"]) == 3
        for reason, tokens in latest["miss_tokens"].items():
            shown = page.locator(f"[data-reason={reason}]").get_attribute("data-tokens")
            assert shown == str(tokens)
        assert page.locator("#history rect").count() == 4 * (LOOKS - 1)
        assert not is_too_wide(page)
        expect(page.locator("#state")).to_have_text("live")
        keep_picture(page, f"fifty-nodes-{request.node.callspec.id}")
        page.close()
