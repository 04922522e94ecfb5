"""Goal: a setting that is wrong is told before anything starts, by name, with what would be right.

Method: parse mappings as a user or vLLM would hand them over, and read the errors as a user would.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvray import config as module
from kvray.config import (
    Config,
    EngineConfig,
    default_extent_bytes,
    default_slab_bytes,
    find_sockets,
    parse_bytes,
    socket_path,
)
from kvray.core import header_page, layout
from kvray.core.layout import Geometry
from kvray.errors import ConfigError

GIB = 1 << 30
NODE = "0123456789abcdef" * 3 + "01234567"


def error_of(settings: dict[str, object], kind: type[Config | EngineConfig] = Config) -> str:
    with pytest.raises(ConfigError) as caught:
        kind.parse(settings)
    assert caught.value.__cause__ is None  # one clear text, not a chain of ours
    return str(caught.value)


def test_an_empty_mapping_is_all_defaults() -> None:
    assert Config.parse({}) == Config()
    assert EngineConfig.parse({}) == EngineConfig()


def test_an_unknown_key_names_the_one_that_was_meant() -> None:
    assert error_of({"slab_gbytes": 4}) == "unknown key 'slab_gbytes' (did you mean 'slab_bytes'?)"
    text = error_of({"lookup_timeout_ms": 5}, EngineConfig)
    assert "unknown key 'lookup_timeout_ms'" in text
    assert "did you mean 'lookup_deadline_ms'?" in text


def test_an_unknown_key_like_no_other_lists_what_is_known() -> None:
    text = error_of({"zzz": 1})
    for name in ("cluster_name", "slab_bytes", "lock"):
        assert name in text


def test_a_setting_of_the_cluster_is_no_setting_of_an_engine() -> None:
    assert "unknown key 'slab_bytes'" in error_of({"slab_bytes": GIB}, EngineConfig)
    assert "unknown key 'model_tag'" in error_of({"model_tag": "a"}, Config)


@pytest.mark.parametrize(
    ("text", "count_bytes"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("10 GiB", 10 * GIB),
        ("512MiB", 512 << 20),
        (" 1.5 gib ", GIB + GIB // 2),
        ("1 GB", 10**9),
        ("3 kB", 3_000),
        ("2 TiB", 2 << 40),
        ("0.001 kB", 1),
    ],
)
def test_byte_sizes_are_numbers_or_text(text: int | str, count_bytes: int) -> None:
    assert parse_bytes(text) == count_bytes


@pytest.mark.parametrize(
    "text", ["", "ten GiB", "10 GiX", "-1 GiB", "1e9", "0.3 B", 1.5, True, None]
)
def test_what_is_no_byte_size_is_an_error(text: object) -> None:
    with pytest.raises(ConfigError, match="bytes"):
        parse_bytes(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_size_survives_being_written_as_text(count_bytes: int) -> None:
    assert parse_bytes(str(count_bytes)) == count_bytes
    assert parse_bytes(f"{count_bytes} KiB") == count_bytes * 1024


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("slab_bytes", "1 KiB", "between 1048576 and"),
        ("slab_bytes", 2.5, "a count of bytes"),
        ("slab_bytes", "9999 TiB", "between 1048576 and"),
        ("extent_bytes", 100_000, "a multiple of 4096"),
        ("extent_bytes", 4096, "between 65536 and"),
        ("lock", "on", "one of 'auto', 'required', 'off'"),
        ("lock", "require", "did you mean 'required'?"),
        ("probation_fraction", 1.5, "a number between 0.0 and 0.9"),
        ("probation_fraction", "0.1", "found '0.1' (str)"),
        ("reused_fraction", 0.95, "a number between 0.0 and 0.9"),
        ("replacement", "lur", "did you mean 'lru'?"),
        ("lookup_deadline_ms", 0, "a whole number of milliseconds between 1 and 60000"),
        ("lookup_deadline_ms", True, "found True (bool)"),
        ("lookup_deadline_ms", None, "found None (NoneType)"),
        ("cluster_name", "My Cluster", "lower-case letters"),
        ("cluster_name", "-a", "no dash first"),
        ("cluster_name", "x" * 33, "1 to 32"),
        ("runtime_dir", "here", "an absolute path"),
        ("runtime_dir", "/" + "d" * 60, "a path at least"),
    ],
)
def test_a_wrong_value_names_key_expectation_and_finding(
    key: str, value: object, expected: str
) -> None:
    text = error_of({key: value, **({"cluster_name": "c" * 32} if key == "runtime_dir" else {})})
    assert text.startswith(f"{key}: expected")
    assert expected in text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("node_id", "head", "a Ray node id in hex"),
        ("socket_path", "/" + "s" * 107, "at most 107 characters"),
        ("store_answers", "yes", "true or false"),
        ("step_budget_ms", 1.5, "a whole number of milliseconds"),
        ("chunk_tokens", 0, "a whole number of tokens"),
        ("model_tag", "a\nb", "printable text"),
    ],
)
def test_a_wrong_value_of_an_engine_is_named_alike(key: str, value: object, expected: str) -> None:
    text = error_of({key: value}, EngineConfig)
    assert text.startswith(f"{key}: expected")
    assert expected in text


def test_a_very_long_wrong_value_does_not_flood_the_error() -> None:
    assert len(error_of({"lock": "x" * 10_000})) < 300


def test_what_is_no_mapping_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        Config.parse([("slab_bytes", 1)])  # type: ignore[arg-type]


def test_an_extent_must_fit_the_slab() -> None:
    assert "at most slab_bytes" in error_of({"slab_bytes": "1 MiB", "extent_bytes": "2 MiB"})


def test_a_size_as_text_is_a_number_once_parsed() -> None:
    assert Config.parse({"slab_bytes": "1 GiB"}).slab_bytes == GIB
    assert Config(slab_bytes="1 GiB").slab_bytes == GIB  # type: ignore[arg-type]


def test_settings_survive_a_trip_as_plain_data() -> None:
    config = Config.parse({"slab_bytes": "2 GiB", "lock": "off", "runtime_dir": "/run/kvray/"})
    assert Config.parse(config.to_dict()) == config
    assert config.runtime_dir == "/run/kvray"
    engine = EngineConfig.parse({"node_id": NODE, "model_tag": "a"})
    assert engine.to_dict() == {"node_id": NODE, "model_tag": "a"}
    assert EngineConfig.parse(engine.to_dict()) == engine


def test_the_default_slab_is_bounded_by_shm_and_by_memory() -> None:
    assert default_slab_bytes(free_shm_bytes=8 * GIB, available_memory_bytes=100 * GIB) == 4 * GIB
    assert default_slab_bytes(free_shm_bytes=80 * GIB, available_memory_bytes=10 * GIB) == 3 * GIB
    with pytest.raises(ConfigError, match="no room for a slab"):
        default_slab_bytes(free_shm_bytes=1 << 20, available_memory_bytes=GIB)


@given(st.integers(min_value=32 << 20, max_value=1 << 42))
def test_the_default_extent_always_cuts_the_slab(slab_bytes: int) -> None:
    geometry = Geometry(slab_bytes, default_extent_bytes(slab_bytes))
    assert geometry.extent_count >= module.MIN_DEFAULT_EXTENTS * 3 // 4


def test_the_smallest_slab_can_be_cut() -> None:
    assert Geometry(module.MIN_SLAB_BYTES, default_extent_bytes(module.MIN_SLAB_BYTES)).extent_count


def test_limits_are_those_of_the_layout() -> None:
    assert module.MIN_EXTENT_BYTES == layout.MIN_EXTENT_BYTES
    assert module.MAX_EXTENT_BYTES == layout.MAX_EXTENT_BYTES
    assert module.MAX_CLUSTER_NAME_CHARS == header_page.MAX_CLUSTER_BYTES


def test_names_are_those_of_the_slab_file(tmp_path: Path) -> None:
    from kvray.node.slab_file import slab_paths

    paths = slab_paths("prod", NODE, runtime=tmp_path)
    assert str(paths.socket) == socket_path(str(tmp_path), "prod", NODE)


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[list[str]]:
    paths = [socket_path(str(tmp_path), "prod", node * 56) for node in "ab"]
    sockets = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in paths]
    for sock, path in zip(sockets, paths, strict=True):
        sock.bind(path)
    socket_of_another = socket_path(str(tmp_path), "prod-2", "c" * 56)
    Path(socket_of_another).touch()
    yield paths
    for sock in sockets:
        sock.close()


def test_an_engine_finds_the_sockets_of_its_cluster_only(
    tmp_path: Path, listening: list[str]
) -> None:
    here = {"cluster_name": "prod", "runtime_dir": str(tmp_path)}
    assert find_sockets(EngineConfig.parse(here)) == listening
    assert find_sockets(EngineConfig.parse(here | {"node_id": "b" * 56})) == listening[1:]
    assert find_sockets(EngineConfig.parse(here | {"node_id": "c" * 56})) == []
    assert find_sockets(EngineConfig.parse(here | {"cluster_name": "test"})) == []
    assert find_sockets(EngineConfig.parse({"socket_path": listening[0]})) == listening[:1]


def test_without_a_runtime_folder_there_is_no_socket() -> None:
    assert find_sockets(EngineConfig.parse({"runtime_dir": "/nonexistent"})) == []


def test_the_default_runtime_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVRAY_RUNTIME_DIR", raising=False)
    assert module.default_runtime_dir() == f"/tmp/kvray-{os.geteuid()}"
    monkeypatch.setenv("KVRAY_RUNTIME_DIR", "/run/kvray")
    assert socket_path(None, "a", NODE).startswith("/run/kvray/a-")


def test_loading_it_costs_an_engine_nothing_else() -> None:
    """Neither numpy nor msgspec, so certainly neither Ray nor NIXL."""
    code = (
        "import sys, kvray, kvray.config, kvray.engine;"
        "foreign = {'ray', 'nixl', 'torch', 'vllm', 'numpy', 'msgspec'};"
        "print(sorted(foreign & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
