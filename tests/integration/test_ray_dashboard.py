"""What a person sees of kvray in Ray's own tools: telling names in its list of actors, which its
dashboard shows, and no flood of tasks.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from playwright.sync_api import expect
from ray.util.state import list_actors, list_tasks

import kvray
from kvray.watch.page import open_page
from tests.block_client import Client
from tests.browser import Look, keep_picture, open_browser
from tests.ray_nodes import wait_until

pytestmark = [pytest.mark.heavy]

WIDE = Look(width=1_600, height=700)
BLOCKS = 64
READY_LIMIT_S = 60.0


@pytest.fixture(scope="module")
def dashboard_url() -> Iterator[str]:
    """kvray on a Ray of one node, with its dashboard."""
    context = ray.init(
        address="local", num_cpus=1, include_dashboard=True, dashboard_port=0, log_to_driver=False
    )
    try:
        cluster = kvray.start(slab_bytes="16 MiB", extent_bytes="1 MiB")
        try:
            open_page(cluster)
            yield f"http://{context.dashboard_url}/"
        finally:
            cluster.stop()
    finally:
        ray.shutdown()


def test_names_tell_what_each_actor_is(dashboard_url: str) -> None:
    del dashboard_url
    actors = {actor.name: actor for actor in list_actors(detail=True)}
    node_id = ray.get_runtime_context().get_node_id()
    assert actors.keys() == {
        "kvray:default:directory",
        "kvray:default:page",
        f"kvray:default:node:{node_id}",
    }
    said = str(actors[f"kvray:default:node:{node_id}"].repr_name)
    assert re.fullmatch(rf"NodeStore\(node={node_id[:8]}, epoch=\d+, slab=16 MiB\)", said), said
    assert str(actors["kvray:default:directory"].repr_name).startswith("Directory(cluster=default")


def test_what_kvray_does_all_the_time_is_no_task_of_ray(dashboard_url: str) -> None:
    """Heartbeats, announces and looks are calls of actors, thousands an hour."""
    del dashboard_url
    cluster = kvray.connect()
    client = Client(cluster, ray.get_runtime_context().get_node_id())
    keys = client.store(*(f"block {i}" for i in range(BLOCKS)))
    wait_until(lambda: all(cluster.where(*keys)), what="the announcement")
    client.close()
    calls = [task.name for task in list_tasks() if task.type == "ACTOR_TASK"]
    assert not calls


def ray_token() -> str:
    """As a person gets it: Ray's token authentication is on, and its dashboard asks for it."""
    command = [str(Path(sys.executable).with_name("ray")), "get-auth-token"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def test_the_dashboard_shows_them(dashboard_url: str) -> None:
    with open_browser() as browser:
        page = browser.open(f"{dashboard_url}#/actors", WIDE)
        page.get_by_placeholder("authentication token").fill(ray_token())
        page.get_by_role("button", name="Submit").click()
        for text in ("kvray:default:directory", "kvray:default:page", "NodeStore(node="):
            expect(page.get_by_text(text).first).to_be_visible()
        keep_picture(page, "ray-dashboard")
        browser.errors.clear()  # Ray's page is not ours
        page.close()
