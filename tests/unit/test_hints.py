"""Reads by peers count at home, and of several replicas the home's is the last to go."""

from kvray.core.ids import BlockKey
from tests.nodes import Cluster, Engine
from tests.shells import key

SLOTS = 32
PREFIX = [key(n) for n in range(3)]


def read(cluster: Cluster, engine: Engine, keys: list[BlockKey]) -> str:
    op = engine.lookup(keys)
    cluster.settle()
    engine.unpin(op)
    return engine.answer(op)


def scan(cluster: Cluster, engine: Engine, first: int, count: int) -> None:
    """Blocks that nobody asks for again."""
    for n in range(first, first + count):
        engine.store(key(n))
        cluster.pass_ms(10)


def has(engine: Engine, keys: list[BlockKey]) -> str:
    return engine.answer(engine.lookup(keys, prefix=False, fetch=False))


def test_what_a_peer_reads_outlives_a_scan_at_its_home() -> None:
    cluster = Cluster.of("home", "reader", slot_count=SLOTS)
    home, reader = Engine(cluster["home"]), Engine(cluster["reader"])
    home.store(*PREFIX)
    cluster.pass_ms(1_000)
    assert read(cluster, reader, PREFIX) == "hhh"
    cluster.pass_ms(1_000)  # a heartbeat: home hears of it
    assert home.node.core.snapshot()["announcing"]["read_by_peers"] == 3
    scan(cluster, home, 1_000, 2 * SLOTS)
    assert has(home, PREFIX) == "hhh"


def test_without_the_read_the_scan_takes_it() -> None:
    cluster = Cluster.of("home", "reader", slot_count=SLOTS)
    home = Engine(cluster["home"])
    home.store(*PREFIX)
    cluster.pass_ms(1_000)
    scan(cluster, home, 1_000, 2 * SLOTS)
    assert has(home, PREFIX) == "mmm"


def test_a_block_that_both_have_computed_goes_where_it_came_later() -> None:
    """Both have stored the prefix, so both are originals. When room is short at the second node it
    hears that they have a home, and loses them before older blocks that only it has."""
    cluster = Cluster.of("home", "second", slot_count=SLOTS)
    home, second = Engine(cluster["home"]), Engine(cluster["second"])
    home.store(*PREFIX)
    cluster.pass_ms(1_000)
    own = [key(n) for n in range(100, 100 + SLOTS - len(PREFIX))]
    second.store(*own)
    second.store(*PREFIX)
    cluster.pass_ms(1_000)
    scan(cluster, second, 1_000, 1)  # goes as in an LRU, and makes the node ask
    assert second.node.core.snapshot()["announcing"]["spared"] == len(PREFIX)
    scan(cluster, second, 2_000, len(PREFIX))
    assert has(second, PREFIX) == "mmm"
    assert has(second, own).count("m") == 1
    assert read(cluster, second, PREFIX) == "hhh", "home has them"


def test_the_home_does_not_spare_what_a_reader_has_copied() -> None:
    cluster = Cluster.of("home", "reader", slot_count=SLOTS)
    home, reader = Engine(cluster["home"]), Engine(cluster["reader"])
    home.store(*PREFIX)
    cluster.pass_ms(1_000)
    read(cluster, reader, PREFIX)
    cluster.pass_ms(1_000)
    scan(cluster, home, 1_000, SLOTS)
    assert home.node.core.snapshot()["announcing"]["spared"] == 0
