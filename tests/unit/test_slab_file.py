"""Goal: files lie where every process of a cluster looks for them, and nobody else can put them
there. Method: real folders, wrong in one way each.
"""

import fcntl
import os
import stat
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kvray.core.ids import NodeId
from kvray.errors import ConfigError, SlabError, UntrustedError
from kvray.node.slab_file import SlabLock, open_slab_file, runtime_directory, slab_paths

NODE = NodeId("0123456789abcdef" + "0" * 40)


def test_names_carry_cluster_and_node(tmp_path: Path) -> None:
    paths = slab_paths("prod-2", NODE, runtime=tmp_path)
    assert paths.slab == Path("/dev/shm/kvray-prod-2-0123456789abcdef.slab")
    assert paths.lock == tmp_path / "prod-2-0123456789abcdef.lock"
    assert paths.socket == tmp_path / "prod-2-0123456789abcdef.sock"


@pytest.mark.parametrize("cluster", ["", "a/b", "A", "a_b", "a.b", "a" * 33, "a\n", ".."])
def test_a_name_that_is_no_file_name_is_refused(tmp_path: Path, cluster: str) -> None:
    with pytest.raises(ConfigError, match="cluster is"):
        slab_paths(cluster, NODE, runtime=tmp_path)


@pytest.mark.parametrize("node", ["", "../../etc", "a-b", "f" * 65])
def test_a_node_id_that_is_none_is_refused(tmp_path: Path, node: str) -> None:
    with pytest.raises(ConfigError, match="node id"):
        slab_paths("a", node, runtime=tmp_path)


def test_a_socket_path_that_unix_can_not_bind_is_refused_before_anybody_tries() -> None:
    fixed = len("/a-0123456789abcdef.sock")
    longest = Path("/" + "d" * (107 - fixed - 1))
    assert len(str(slab_paths("a", NODE, runtime=longest).socket)) == 107
    with pytest.raises(ConfigError, match="KVRAY_RUNTIME_DIR to a shorter"):
        slab_paths("a", NODE, runtime=Path(f"{longest}d"))


# ── the runtime folder ───────────────────────────────────────────────────────────────────────────


def test_the_runtime_folder_is_made_for_this_user_only(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        folder = runtime_directory(tmp_path / "run")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert runtime_directory(tmp_path / "run") == folder, "and taken as it is the second time"


def test_the_runtime_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVRAY_RUNTIME_DIR", str(tmp_path / "chosen"))
    assert runtime_directory() == tmp_path / "chosen"


@pytest.mark.parametrize("mode", [0o770, 0o701, 0o750, 0o777])
def test_a_folder_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(mode)
    with pytest.raises(UntrustedError, match=rf"mode {mode:o}.*chmod 700"):
        runtime_directory(tmp_path / "run")


def test_a_link_to_a_good_folder_is_refused(tmp_path: Path) -> None:
    """Whoever made the link may let it point elsewhere later."""
    runtime_directory(tmp_path / "good")
    (tmp_path / "run").symlink_to(tmp_path / "good")
    with pytest.raises(UntrustedError, match="is not a folder"):
        runtime_directory(tmp_path / "run")


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch(mode=0o700)
    with pytest.raises(UntrustedError, match="is not a folder"):
        runtime_directory(tmp_path / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of somebody else")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    os.chown(tmp_path / "run", 65_534, 65_534)
    with pytest.raises(UntrustedError, match="belongs to user 65534"):
        runtime_directory(tmp_path / "run")


def test_a_folder_that_can_not_be_made_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file.*Set KVRAY_RUNTIME_DIR"):
        runtime_directory(tmp_path / "missing" / "run")


# ── the lock and the slab ────────────────────────────────────────────────────────────────────────


def test_a_lock_is_held_once_and_stays_when_released(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    lock = SlabLock.acquire(path)
    assert lock is not None
    assert SlabLock.acquire(path) is None
    assert [os.get_inheritable(descriptor) for descriptor in descriptors_of(path)] == [False]
    inode = path.stat().st_ino

    lock.release()
    lock.release()

    again = SlabLock.acquire(path)
    assert again is not None
    assert path.stat().st_ino == inode, "never unlinked: an unlinked lock can be held twice"
    again.release()


def descriptors_of(path: Path) -> list[int]:
    own = Path("/proc/self/fd")
    return [int(entry.name) for entry in own.iterdir() if entry.resolve() == path]


def test_a_lock_file_that_somebody_has_removed_is_made_anew(tmp_path: Path) -> None:
    """A cleaner of /tmp; the header page's owner is the second guard then."""
    path = tmp_path / "a.lock"
    lock = SlabLock.acquire(path)
    assert lock is not None
    path.unlink()
    other = SlabLock.acquire(path)
    assert other is not None
    other.release()
    lock.release()


def test_a_lock_file_replaced_while_it_is_being_locked_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise we would hold a file that nobody else ever finds."""
    path = tmp_path / "a.lock"
    flock = fcntl.flock

    def clean_up_first(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", clean_up_first)
    lock = SlabLock.acquire(path)
    assert lock is not None
    assert SlabLock.acquire(path) is None
    lock.release()


def test_a_link_is_no_lock_and_no_slab(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(SlabError, match="can not open the lock"):
        SlabLock.acquire(tmp_path / "link")
    with pytest.raises(SlabError, match="not a slab of this user"):
        open_slab_file(tmp_path / "link")
    assert (tmp_path / "real").read_bytes() == b"precious"


def test_something_else_under_the_slabs_name_is_left_alone(tmp_path: Path) -> None:
    with TemporaryDirectory(dir=tmp_path) as folder, pytest.raises(SlabError, match="remove it"):
        open_slab_file(Path(folder))
    assert open_slab_file(tmp_path / "nothing") is None
