"""Which way bytes came is read from counters: whoever has carried them has counted them."""

from pathlib import Path

import pytest

from kvray.core.way import MIN_JUDGED_BYTES, Carried, Counters, Way, carried
from kvray.node.host import host_facts, read_counters

READ = 40 << 20
NOISE = READ // 50  # of others, in the same moment
BEFORE = Counters({"lo": 7, "eth0": 1 << 40, "eth1": 3}, {"mlx5_0/1": 1 << 50, "mlx5_1/1": 0})


def after(**grown: int) -> Counters:
    """By device; "mlx5_0" stands for its port."""
    return Counters(
        {name: count + grown.get(name, 0) for name, count in BEFORE.interfaces.items()},
        {name: count + grown.get(name[:6], 0) for name, count in BEFORE.rdma_ports.items()},
    )


@pytest.mark.parametrize(
    ("grown", "expected"),
    [
        ({}, Carried(Way.CMA)),
        ({"lo": NOISE, "eth0": NOISE, "mlx5_0": NOISE}, Carried(Way.CMA)),
        ({"eth0": READ}, Carried(Way.TCP, ("eth0",))),
        ({"eth0": READ + NOISE, "lo": NOISE}, Carried(Way.TCP, ("eth0",))),
        ({"lo": READ}, Carried(Way.TCP, ("lo",))),
        ({"mlx5_0": READ, "eth0": NOISE}, Carried(Way.RDMA, ("mlx5_0/1",))),
        ({"mlx5_0": READ // 2, "mlx5_1": READ // 2}, Carried(Way.RDMA, ("mlx5_0/1", "mlx5_1/1"))),
        ({"eth0": READ // 4, "eth1": READ - READ // 4}, Carried(Way.TCP, ("eth1", "eth0"))),
        # IPoIB, or somebody else's transfer: nobody can tell from these numbers
        ({"mlx5_0": READ, "eth0": READ}, Carried(Way.UNCLEAR, ("mlx5_0/1", "eth0"))),
        # the last packets are counted a moment later
        ({"eth0": READ - READ // 20}, Carried(Way.TCP, ("eth0",))),
        ({"eth0": READ // 2}, Carried(Way.CMA)),
    ],
)
def test_bytes_came_by_what_has_counted_them(grown: dict[str, int], expected: Carried) -> None:
    assert carried(BEFORE, after(**grown), READ) == expected


def test_a_device_that_comes_goes_or_is_reset_meanwhile_has_carried_nothing() -> None:
    before = Counters({"eth0": READ, "gone": 0}, {"mlx5_0/1": READ})
    now = Counters({"eth0": 0, "new": READ}, {"mlx5_0/1": 0, "mlx5_9/1": READ})
    assert carried(before, now, READ) == Carried(Way.CMA)


def test_too_few_bytes_are_not_judged() -> None:
    with pytest.raises(AssertionError):
        carried(BEFORE, BEFORE, MIN_JUDGED_BYTES - 1)


NET_DEV = """\
Inter-|   Receive                            |  Transmit
 face |bytes    packets errs drop fifo frame |bytes    packets
    lo: 287121699646 35238439    0    0    0     0     1      1
  eth0:10048707278  220011    0    0    0     0        2      2
"""


def test_counters_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    # Method: files as the kernel has them; a port's counter is in words of four bytes, and a
    # driver that has none says so with an error or with other text.
    net_dev = tmp_path / "dev"
    net_dev.write_text(NET_DEV)
    for device, text in (("mlx5_0", "1000\n"), ("rxe0", "N/A (no PMA)\n"), ("efa0", None)):
        folder = tmp_path / "infiniband" / device / "ports" / "1" / "counters"
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "port_rcv_data").write_text(text)
    found = read_counters(net_dev, tmp_path / "infiniband")
    assert found.interfaces == {"lo": 287_121_699_646, "eth0": 10_048_707_278}
    assert found.rdma_ports == {"mlx5_0/1": 4_000}


def test_this_host_has_counters_and_facts() -> None:
    assert "lo" in read_counters().interfaces
    assert {"rdma_ports", "has_verbs", "ucx_settings"} <= host_facts("127.0.0.1").keys()
