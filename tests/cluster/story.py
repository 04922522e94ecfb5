"""A cluster from `ray up` to `ray down`, on three hosts made of namespaces.

    ray up          head a, and worker b that the autoscaler on a starts over ssh: two NodeStores
    a peer hit      an engine on a computes a prompt, one on b asks for it: blocks cross the wire
    a third host    c is started when more is asked for, and gets its NodeStore by itself
    a drain         what only b has is taken over by the others
    ray down        nothing runs on a host any more, nothing is left of the hosts

Everything is real but the walls between the hosts: sshd, rsync, Ray with its autoscaler and token
authentication, kvray's command line, NIXL over TCP, two vLLM engines.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvray.engine.arguments import transfer_settings
from tests import in_engine, leftovers
from tests.cluster.hosts import Host, Hosts, remains, running_hosts, wait_for
from tests.cluster.launcher import TOKEN, Launcher
from tests.engines import Engine, start_engine
from tests.models import tiny
from tests.prompts import full_chunks, prompt_of
from tests.ray_nodes import PATIENT

DESK, HEAD, WORKER, THIRD = "desk", "a", "b", "c"
PROMPT_TOKENS = 4_000  # 31 blocks of 1 MiB: more than all else that is said in that time
OTHER_TOKENS = 1_000  # of the prompt that only the drained host has
JOIN_LIMIT_S = 120.0  # ssh, a raylet, an actor, on a busy machine; 10 s on a quiet one
SETTLE_LIMIT_S = 60.0  # Ray's processes end within 16 s of `ray stop`
LOOK_PERIOD_S = 1.0  # a look is a Python that loads Ray
# Three hosts of two CPUs each: five are more than two of them have.
MORE_THAN_TWO_HOSTS = """
import ray
from ray.autoscaler.sdk import request_resources
ray.init(address="auto", log_to_driver=False)
request_resources(num_cpus=5)
"""


@dataclass
class Result:
    """hosts: of the cluster. peer_bytes: that b's NodeStore fetched for its engine; wire_rx_bytes:
    that b's interface received meanwhile. leftovers: how many, each of them said on stderr.
    """

    hosts: int = 0
    node_stores: int = 0
    peer_hit_tokens: int = 0
    peer_bytes: int = 0
    wire_rx_bytes: int = 0
    leftovers: int = 0

    def problems(self) -> list[str]:
        """What is not as it has to be."""
        wanted = full_chunks(PROMPT_TOKENS)
        found = [
            (self.node_stores == self.hosts == 3, "three hosts with a NodeStore each"),
            (self.peer_hit_tokens == wanted, f"{wanted} tokens from a peer"),
            (0 < self.peer_bytes <= self.wire_rx_bytes, "the bytes of the blocks on the wire"),
            (not self.leftovers, "nothing left behind"),
        ]
        return [f"expected {what}, found {self}" for is_so, what in found if not is_so]


def play() -> Result:
    """Raises HostsError where such hosts are not allowed, CommandError if a command fails."""
    result = Result()
    before = leftovers.look()
    with short_folder() as folder:
        tiny()  # built before the hosts are: they do not see what comes to this machine later
        say("booting four hosts")
        with running_hosts(DESK, HEAD, WORKER, THIRD, folder=folder) as hosts:
            launcher = Launcher(hosts, desk=DESK, head=HEAD, workers=[WORKER, THIRD])
            launch(hosts, launcher)
            hit_on_the_worker(hosts, folder, result)
            look_at_the_way(hosts)
            add_the_third(hosts, result)
            drain_the_worker(hosts)
            take_down(hosts, launcher)
            left = left_on_hosts(hosts)
    left += remains(hosts) + leftovers.wait_for_none(before, all_fds=False)
    for what in left:
        say(f"left behind: {what}")
    result.leftovers = len(left)
    return result


def launch(hosts: Hosts, launcher: Launcher) -> None:
    say("ray get-auth-token --generate, ray up: the head over ssh, the worker by the autoscaler")
    launcher.make_token()
    launcher.up()
    await_node_stores(hosts, HEAD, WORKER)


def hit_on_the_worker(hosts: Hosts, folder: Path, result: Result) -> None:
    """An engine on the head computes a prompt; one on the worker does not. Then it computes one of
    its own, which no other host has.
    """
    prompt = prompt_of(PROMPT_TOKENS, seed=1)
    say("starting a vLLM engine on each of the two")
    with engine_on(hosts[HEAD], folder) as a, engine_on(hosts[WORKER], folder) as b:
        for engine in (a, b):
            engine.generate(prompt_of(200, seed=9))  # nobody has met a cold engine's first step
        say(f"the engine on {HEAD} computes {PROMPT_TOKENS} tokens")
        computed = a.generate(prompt, max_tokens=8)
        a.call(in_engine.settle)
        before, fetched = hosts[WORKER].received_bytes(), status(hosts)["fetched_bytes"]
        tokens = hit_tokens(b)
        reused = b.generate(prompt, max_tokens=8)
        result.peer_hit_tokens = hit_tokens(b) - tokens
        result.wire_rx_bytes = hosts[WORKER].received_bytes() - before
        result.peer_bytes = status(hosts)["fetched_bytes"] - fetched
        say(
            f"the engine on {WORKER} had {result.peer_hit_tokens} of them from {HEAD}: "
            f"{result.peer_bytes:,} bytes of blocks, {result.wire_rx_bytes:,} on its interface; "
            f"first token after {computed.ttft_ms:,.0f} ms there and {reused.ttft_ms:,.0f} here"
        )
        b.generate(prompt_of(OTHER_TOKENS, seed=2))
        b.call(in_engine.settle)


def look_at_the_way(hosts: Hosts) -> None:
    """By kvray's own measure: the kernel's counters around reads of its own."""
    links = json.loads(on_head(hosts, "kvray", "doctor", "--json"))["links"]
    ways = [link["way"] for link in links]
    say(f"kvray doctor: {len(links)} links, by {', '.join(ways)}")
    assert ways == ["tcp", "tcp"], links


def add_the_third(hosts: Hosts, result: Result) -> None:
    say("asking Ray's autoscaler for more CPUs than two hosts have")
    on_head(hosts, sys.executable, "-c", MORE_THAN_TWO_HOSTS)
    result.hosts = len(await_node_stores(hosts, HEAD, WORKER, THIRD))
    nodes = status(hosts)["nodes"]
    result.node_stores = sum(node["state"] == "ready" for node in nodes)


def drain_the_worker(hosts: Hosts) -> None:
    (node,) = (node for node in status(hosts)["nodes"] if node["host"] == WORKER)
    drained = json.loads(on_head(hosts, "kvray", "drain", node["node"], "--json"))
    say(f"drained {WORKER}: {drained}")
    alone = full_chunks(OTHER_TOKENS) // full_chunks(129)
    assert drained["lost"] == 0, drained
    assert drained["fetched"] >= alone, f"{alone} blocks were nowhere else: {drained}"
    await_node_stores(hosts, HEAD, THIRD)


def take_down(hosts: Hosts, launcher: Launcher) -> None:
    say("kvray stop, ray down")
    launcher.exec("RAY_AUTH_MODE=token kvray stop")
    left = [
        f"{name}: {path}"
        for name in (HEAD, WORKER, THIRD)
        for path in hosts[name].run("find", "/dev/shm", "/tmp", "-name", "kvray-*").split()
        if path.endswith((".slab", ".sock"))
    ]
    assert not left, left
    launcher.down()
    # `ray down` runs `ray stop` on the head, and `docker stop` everywhere, which ends the workers.
    for name in (WORKER, THIRD):
        hosts[name].run("ray", "stop")


def left_on_hosts(hosts: Hosts) -> list[str]:
    """Once Ray's processes have had their time."""
    names = (HEAD, WORKER, THIRD)
    wait_for(lambda: not any(hosts[name].processes() for name in names), limit_s=SETTLE_LIMIT_S)
    return [f"on host {name}: {line}" for name in names for line in hosts[name].processes()]


# ---- what the chapters share


@contextmanager
def engine_on(host: Host, folder: Path) -> Iterator[Engine]:
    """A vLLM engine as a plain process of that host. It finds its NodeStore as any engine does."""
    engine = start_engine(
        tiny(),
        folder=folder,
        within=host.command,
        kv_transfer_config=transfer_settings(PATIENT),
    )
    try:
        yield engine
    finally:
        engine.close()


def hit_tokens(engine: Engine) -> int:
    return int(engine.call(in_engine.settle)["counters"]["hit_tokens_peer"])


def on_head(hosts: Hosts, *words: str) -> str:
    return hosts[HEAD].run(*words, environment=TOKEN)


def status(hosts: Hosts) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(on_head(hosts, "kvray", "status", "--json"))
    return found


def await_node_stores(hosts: Hosts, *names: str) -> list[dict[str, Any]]:
    """Until exactly these hosts have a NodeStore that serves and knows the others."""
    found: list[dict[str, Any]] = []

    def are_ready() -> bool:
        nodes = status(hosts)["nodes"]
        found[:] = [node for node in nodes if node["state"] == "ready"]
        return {node["host"] for node in found} == set(names) and all(
            node["peers"] >= len(names) - 1 for node in found
        )

    is_so = wait_for(are_ready, limit_s=JOIN_LIMIT_S, poll_s=LOOK_PERIOD_S)
    assert is_so, f"expected NodeStores on {names} within {JOIN_LIMIT_S:.0f} s, found {found}"
    say(f"NodeStores serve on {', '.join(names)}")
    return found


@contextmanager
def short_folder() -> Iterator[Path]:
    """Unix sockets below it have a path of at most 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="kvray-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


_begun_s = time.monotonic()


def say(line: str) -> None:
    sys.stderr.write(f"{time.monotonic() - _begun_s:5.0f} s  {line}\n")
    sys.stderr.flush()


def as_json(result: Result) -> str:
    return json.dumps(asdict(result))
