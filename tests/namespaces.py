"""Network namespaces of this machine, so that a link can be cut while everything else goes on.

    control   10.77.1.0/24   a bridge of this process's own network, "control0" in a namespace: Ray
    data      10.77.2.0/24   another one, and "data0": the bytes of blocks

    with namespaces("b") as net:
        net.command("b", "ray", "start", ...)      how a program is run in there
        net.cut("b", "data")   net.heal("b", "data")

A cut end keeps its carrier and its address: what is sent disappears, as behind a switch that died.
Needs CAP_SYS_ADMIN and CAP_NET_ADMIN; NamespacesError says what is not allowed.
"""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PREFIX = "kvr"  # of all names: an interface's has at most 15 characters
OWN = "own"  # where a namespace's name stands elsewhere
COMMAND_LIMIT_S = 10.0
NETWORKS = {"control": 1, "data": 2}


class NamespacesError(Exception):
    """They can not be made here; the text says why."""


@dataclass(frozen=True)
class Namespaces:
    names: tuple[str, ...]

    def own_address(self, network: str) -> str:
        """Of this process's own network, where no namespace is."""
        return f"10.77.{NETWORKS[network]}.1"

    def own_device(self, network: str) -> str:
        return _own_end(network)

    def address(self, name: str, network: str) -> str:
        return f"10.77.{NETWORKS[network]}.{11 + self.names.index(name)}"

    def device(self, network: str) -> str:
        """The same in every namespace."""
        return f"{network}0"

    def bridge_devices(self, name: str, network: str) -> tuple[str, ...]:
        """What carries bytes to and from this namespace, in this process's own network."""
        return (_bridge(network), _outer(network, name), _outer(network, OWN))

    def command(self, name: str, *command: str) -> list[str]:
        return ["ip", "netns", "exec", _namespace(name), *command]

    def cut(self, name: str, network: str) -> None:
        """This namespace's end of that network, silently."""
        _ip("link", "set", _outer(network, name), "nomaster")

    def heal(self, name: str, network: str) -> None:
        _ip("link", "set", _outer(network, name), "master", _bridge(network))

    def slow_down(self, name: str, rate: str) -> None:
        """What leaves this namespace over the data network, as "200mbit"."""
        limit = ["rate", rate, "burst", "256kb", "latency", "400ms"]
        device = ["dev", "data0", "root", "tbf", *limit]
        _run(self.command(name, "tc", "qdisc", "replace", *device))

    def carried_bytes(self, name: str, network: str) -> int:
        """To and from this namespace, by the interface's own counters: what went another way is
        not in them.
        """
        folder = Path(f"/sys/class/net/{_outer(network, name)}/statistics")
        return sum(int((folder / f"{way}_bytes").read_text()) for way in ("rx", "tx"))

    def received_bytes(self, name: str, network: str) -> int:
        """By this namespace, by the counter of the interface's outer end, which sent them."""
        return int(Path(f"/sys/class/net/{_outer(network, name)}/statistics/tx_bytes").read_text())


@contextmanager
def namespaces(*names: str, networks: Sequence[str] = tuple(NETWORKS)) -> Iterator[Namespaces]:
    """Raises NamespacesError. Gone afterwards; whatever runs in them must be gone before."""
    _remove(names)
    try:
        for network in networks:
            number = NETWORKS[network]
            _ip("link", "add", _bridge(network), "type", "bridge")
            _ip("link", "set", _bridge(network), "up")
            # A port of its own, since UCX does not use a bridge as a device.
            _ip("link", "add", _outer(network, OWN), "type", "veth", "peer", _own_end(network))
            _ip("link", "set", _outer(network, OWN), "master", _bridge(network), "up")
            _ip("addr", "add", f"10.77.{number}.1/24", "dev", _own_end(network))
            _ip("link", "set", _own_end(network), "up")
            for index, name in enumerate(names):
                if network == networks[0]:
                    _ip("netns", "add", _namespace(name))
                    _ip("-n", _namespace(name), "link", "set", "lo", "up")
                _join(network, name, f"10.77.{number}.{11 + index}/24")
        yield Namespaces(names)
    finally:
        _remove(names)


def _join(network: str, name: str, address: str) -> None:
    inner, outer, namespace = f"{network}0", _outer(network, name), _namespace(name)
    peer = ["peer", "name", inner, "netns", namespace]
    _ip("link", "add", outer, "type", "veth", *peer)
    _ip("link", "set", outer, "master", _bridge(network), "up")
    _ip("-n", namespace, "addr", "add", address, "dev", inner)
    _ip("-n", namespace, "link", "set", inner, "up")


def remains(names: Sequence[str]) -> list[str]:
    """What is there of namespaces with these names, and of their networks."""
    found = [name for name in _ip("netns", "list").split() if name in map(_namespace, names)]
    return found + [link.name for link in Path("/sys/class/net").glob(f"{PREFIX}-*")]


def _remove(names: tuple[str, ...]) -> None:
    for name in (*names, OWN):
        with suppress(NamespacesError):  # it is not there
            _ip("netns", "del", _namespace(name))
        for network in NETWORKS:
            with suppress(NamespacesError):  # it went with its namespace
                _ip("link", "del", _outer(network, name))
    for network in NETWORKS:
        with suppress(NamespacesError):
            _ip("link", "del", _bridge(network))


def _namespace(name: str) -> str:
    return f"{PREFIX}-{name}"


def _bridge(network: str) -> str:
    return f"{PREFIX}-{network}"


def _own_end(network: str) -> str:
    return f"{PREFIX}-{network}0"


def _outer(network: str, name: str) -> str:
    return f"{PREFIX}-{network[0]}-{name}"


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NamespacesError(f"{' '.join(command)}: {exc}") from exc
    if done.returncode:
        raise NamespacesError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
