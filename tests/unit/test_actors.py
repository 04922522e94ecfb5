"""Goal: a bug ends an actor's process at once and is told; names of two clusters never meet; a Ray
that kvray was not tested with is refused by name.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import requires

import pytest
import ray

from kvray.actors import (
    BUG_EXIT_CODE,
    TESTED_RAY,
    directory_name,
    node_store_name,
    node_store_prefix,
    one_line,
    refuse_untested_ray,
)
from kvray.errors import ConfigError

NODE = "ab" * 28


def run(code: str, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, check=False
    )


def test_a_bug_ends_the_process_and_leaves_its_story() -> None:
    done = run(
        """
import threading
from kvray.actors import ending_on_bug, log_to_stderr
log_to_stderr()
def loop():
    with ending_on_bug("a thread"):
        assert 1 == 2, "the reason"
threading.Thread(target=loop).start()
threading.Event().wait()
"""
    )
    assert done.returncode == BUG_EXIT_CODE
    assert "a bug in a thread" in done.stderr
    assert "AssertionError: the reason" in done.stderr


def test_the_niceness_of_a_ray_worker_is_undone_in_all_of_its_threads() -> None:
    """As root, who may; anybody else is told what to do."""
    done = run(
        """
import os, threading
from kvray.actors import run_at_normal_priority
os.nice(15)
threading.Thread(target=threading.Event().wait, daemon=True).start()
before = {os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")}
allowed = run_at_normal_priority()
after = {os.getpriority(os.PRIO_PROCESS, int(t)) for t in os.listdir("/proc/self/task")}
print(before, after, allowed)
"""
    )
    if os.geteuid() == 0:
        assert done.stdout == "{15} {0} True\n"
    else:
        assert done.stdout == "{15} {15} False\n"
        assert "RAY_worker_niceness=0" in done.stderr


def test_asserts_can_not_be_switched_off() -> None:
    code = "from kvray.actors import refuse_optimized; refuse_optimized()"
    assert run(code).returncode == 0
    refused = run(code, "-O")
    assert refused.returncode == 1
    assert "ConfigError" in refused.stderr


@pytest.mark.parametrize("version", ["2.60.0", "2.60.7"])
def test_every_release_of_the_tested_ray_will_do(version: str) -> None:
    refuse_untested_ray(version)


def test_the_installed_ray_and_the_pinned_one_are_the_tested_one() -> None:
    refuse_untested_ray(ray.__version__)
    pins = [need for need in requires("kvray") or [] if need.startswith("ray[")]
    assert pins
    assert all(f">={TESTED_RAY}" in pin for pin in pins)


@pytest.mark.parametrize("version", ["2.6.0", "2.59.1", "2.61.0", "3.0.0.dev0"])
def test_another_ray_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(ConfigError, match=rf"{re.escape(version)}.*install 'ray\[default\]~=2\.60"):
        refuse_untested_ray(version)


def test_both_versions_of_an_error_of_ray_are_told() -> None:
    said = "Version mismatch: the cluster:\n    Ray: 2.60.0\nthis process:\n    Ray: 2.60.1\n"
    assert {"2.60.0", "2.60.1"} <= set(one_line(RuntimeError(said)).split())
    assert one_line(RuntimeError()) == "RuntimeError"


def test_info_lines_reach_the_log_once() -> None:
    done = run(
        """
import logging
from kvray.actors import log_to_stderr
logging.basicConfig()
log_to_stderr()
log_to_stderr()
logging.getLogger("kvray.node").info("one line")
"""
    )
    assert done.stderr.count("one line") == 1


def test_a_prefix_names_the_node_stores_of_one_cluster_only() -> None:
    assert node_store_name("a", NODE).startswith(node_store_prefix("a"))
    for other in ("ab", "a-b"):
        assert not node_store_name(other, NODE).startswith(node_store_prefix("a"))
    assert not directory_name("a").startswith(node_store_prefix("a"))
