"""A NodeStore knows the interface of its node's address, and each port on which it listens.

Method: this host's own interfaces and sockets; RDMA ports as files of the kernel's form.
"""

import socket
from pathlib import Path

import pytest

from kvray.network import Listener, interface_of, listeners, ucx_devices


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1"])
def test_loopback_is_one_interface_with_all_its_addresses(address: str) -> None:
    assert interface_of(address) == "lo"


def test_the_interface_of_this_hosts_address_is_found() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing: the kernel chooses an address
        except OSError:
            pytest.skip("this host has no route to other ones")
        own = sock.getsockname()[0]

    found = interface_of(own)

    assert found in {name for _, name in socket.if_nameindex()}


@pytest.mark.parametrize("address", ["198.51.100.7", "2001:db8::7", "", "no address"])
def test_an_address_of_nobody_leaves_the_choice_to_ucx(address: str) -> None:
    assert interface_of(address) is None
    assert ucx_devices(address) == ""


def test_a_node_on_loopback_has_no_other_device(tmp_path: Path) -> None:
    rdma_port(tmp_path, "mlx5_0", 1, "4: ACTIVE")

    assert ucx_devices("127.0.0.1", tmp_path) == "lo"


def test_rdma_ports_that_work_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvray.network.interface_of", lambda _: "eth1")
    rdma_port(tmp_path, "mlx5_0", 1, "4: ACTIVE")
    rdma_port(tmp_path, "mlx5_1", 1, "1: DOWN")
    rdma_port(tmp_path, "mlx5_2", 2, "4: ACTIVE")

    assert ucx_devices("198.51.100.7", tmp_path) == "mlx5_0:1,mlx5_2:2,eth1"


def rdma_port(folder: Path, device: str, port: int, state: str) -> None:
    path = folder / device / "ports" / str(port)
    path.mkdir(parents=True)
    (path / "state").write_text(f"{state}\n")


@pytest.mark.parametrize(
    ("family", "address"),
    [
        (socket.AF_INET, "127.0.0.1"),
        (socket.AF_INET, "127.0.0.9"),
        (socket.AF_INET6, "::1"),
        (socket.AF_INET6, "::ffff:127.0.0.1"),
    ],
)
def test_a_port_is_listed_while_this_process_listens_on_it(
    family: socket.AddressFamily, address: str
) -> None:
    with socket.socket(family) as sock:
        try:
            sock.bind((address, 0))
        except OSError:
            pytest.skip(f"this host has no {address}")
        port = sock.getsockname()[1]
        expected = Listener(address.removeprefix("::ffff:"), port)
        assert expected not in listeners()
        sock.listen()
        assert expected in listeners()
    assert expected not in listeners()
