"""Every setting of kvray, parsed once and loud; and the sockets that follow from them.

    Config         a cluster: what kvray.start() takes, equal on all nodes
    EngineConfig   an engine: what travels in kv_connector_extra_config["kvray"]

Both are frozen. Making one checks it, whether by keyword or by parse(), and byte sizes may be
given as text ("10 GiB"). Nothing is imported but the standard library: engines load this module.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar, cast

from kvray.errors import ConfigError
from kvray.ownership import check_private_folder

LockMode = Literal["auto", "required", "off"]
LOCK_MODES: tuple[LockMode, ...] = ("auto", "required", "off")

Replacement = Literal["segmented", "lru"]  # as core.eviction has it, which imports the core
REPLACEMENTS: tuple[Replacement, ...] = ("segmented", "lru")

SHM_FOLDER = "/dev/shm"
NODE_NAME_CHARS = 16  # of a node id in a file's name: 64 bits of a random number tell nodes apart
MAX_CLUSTER_NAME_CHARS = 32  # what the slab's header page has room for
MAX_SOCKET_PATH_BYTES = 107  # sun_path has 108, with a zero at the end

MIN_SLAB_BYTES = 1 << 20  # a slab that holds a handful of blocks: for tests
MAX_SLAB_BYTES = 1 << 46  # 64 TiB: more than a machine has; catches a size with a unit too many
DEFAULT_SHM_SHARE = 0.5  # of the free /dev/shm: Ray's object store lies there too
DEFAULT_MEMORY_SHARE = 0.3  # of the available memory: the models' weights pass through it
MIN_DEFAULT_EXTENTS = 32  # of a slab, so that several models can share it
MIN_EXTENT_BYTES = 64 * 1024  # both as core.layout says it, which imports numpy
MAX_EXTENT_BYTES = 4 * 1024**3 - 4_096
MAX_DEFAULT_EXTENT_BYTES = 512 << 20  # see default_extent_bytes

MAX_DEADLINE_MS = 60_000  # of a look-up: after a minute a recompute has long been cheaper
MAX_STEP_BUDGET_MS = 1_000
MIN_EARLY_CORES = 4  # two that compute or feed a GPU, one that reads, one that copies
MAX_TAG_CHARS = 256

MAX_SHOWN_CHARS = 80  # of a wrong value, in an error

T = TypeVar("T", bound="Config | EngineConfig")
Read = Callable[[object], object]  # checks one value, or raises _Unfit


class _Unfit(Exception):  # noqa: N818 (never leaves this module)
    """A value does not fit. expected: what would; advice: an example or what to do."""

    def __init__(self, expected: str, advice: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.advice = advice


def parse_bytes(value: object) -> int:
    """A count of bytes from an int or from text: 4096, "512MiB", "10 GiB", "1.5 GB".

    Raises ConfigError. KiB, MiB, GiB, TiB are powers of 1,024; kB, MB, GB, TB of 1,000.
    """
    try:
        return _bytes_of(value)
    except _Unfit as exc:
        raise ConfigError(f"expected {exc.expected}, found {_shown(value)}") from None


def _bytes_of(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    expected = 'a count of bytes, as an int or as text like "512 MiB" or "10 GiB"'
    if not isinstance(value, str):
        raise _Unfit(expected)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None:
        raise _Unfit(expected)
    unit_bytes = _UNITS.get(match[2].lower())
    if unit_bytes is None:
        raise _Unfit(f"{expected} (units: {', '.join(_UNIT_NAMES)})")
    whole, _, part = match[1].partition(".")
    scaled = int(whole + part) * unit_bytes
    if scaled % 10 ** len(part):
        raise _Unfit("a whole number of bytes")
    return int(scaled // 10 ** len(part))


_UNIT_NAMES = ("B", "kB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB")
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1_000), ("ib", 1_024))
}


# ---- one reader per kind of setting


def _size(low: int, high: int) -> Read:
    def read(value: object) -> int:
        count_bytes = _bytes_of(value)
        if not low <= count_bytes <= high:
            raise _Unfit(f"between {low} and {high} bytes")
        return count_bytes

    return read


def _whole(low: int, high: int, unit: str) -> Read:
    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise _Unfit(f"a whole number of {unit} between {low} and {high}")
        return value

    return read


def _fraction(low: float, high: float) -> Read:
    def read(value: object) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits or not low <= cast("float", value) <= high:
            raise _Unfit(f"a number between {low} and {high}")
        return float(cast("float", value))

    return read


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Unfit("true or false")
    return value


def _one_of(*choices: str) -> Read:
    def read(value: object) -> str:
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            raise _Unfit(
                "one of " + ", ".join(repr(choice) for choice in choices),
                f"did you mean {near[0]!r}?" if near else "",
            )
        return str(value)

    return read


def _text(max_chars: int) -> Read:
    def read(value: object) -> str:
        if not isinstance(value, str) or len(value) > max_chars or not value.isprintable():
            raise _Unfit(f"printable text of at most {max_chars} characters")
        return value

    return read


def _cluster_name(value: object) -> str:
    pattern = rf"[a-z0-9][a-z0-9-]{{0,{MAX_CLUSTER_NAME_CHARS - 1}}}"
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise _Unfit(
            f"1 to {MAX_CLUSTER_NAME_CHARS} lower-case letters, digits, dashes; no dash first",
            "the name becomes part of file and actor names",
        )
    return value


def _node_id(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{8,64}", value):
        raise _Unfit("a Ray node id in hex", "see ray.nodes()")
    return value


def _folder(value: object) -> str:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise _Unfit("an absolute path")
    return value.rstrip("/") or "/"


def _by(read: Read) -> dict[str, Read]:
    """A field's metadata: how its value is read."""
    return {"read": read}


# ---- the two sets of settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One kvray cluster. All nodes get the same; a second start() must ask for the same.

    slab_bytes: None takes default_slab_bytes() of each node.
    extent_bytes: None takes default_extent_bytes() of the slab.
    lock: of the slab in memory (mlock). "auto" warns where memlock does not allow it.
    replacement: which block goes when room is needed; "lru" is there to be compared with.
    audit_rate: of the blocks that engines store, how many may be computed once more, to be compared
        with what another maker has stored, and never more than half a percent of an engine's
        prefill; 0: none is compared after the canaries.
    probation_fraction: of the slots of one size, for blocks fetched from peers; not with "lru".
    reused_fraction: of the slots of one size, for blocks that were used again; not with "lru".
    lookup_deadline_ms: what engines that kvray attaches get as their own.
    runtime_dir: folder of sockets; None takes default_runtime_dir() of each node.
    """

    cluster_name: str = field(default="default", metadata=_by(_cluster_name))
    slab_bytes: int | None = field(
        default=None, metadata=_by(_size(MIN_SLAB_BYTES, MAX_SLAB_BYTES))
    )
    extent_bytes: int | None = field(
        default=None, metadata=_by(_size(MIN_EXTENT_BYTES, MAX_EXTENT_BYTES))
    )
    lock: LockMode = field(default="auto", metadata=_by(_one_of(*LOCK_MODES)))
    replacement: Replacement = field(default="segmented", metadata=_by(_one_of(*REPLACEMENTS)))
    audit_rate: float = field(default=0.005, metadata=_by(_fraction(0.0, 0.005)))
    probation_fraction: float = field(default=0.01, metadata=_by(_fraction(0.0, 0.9)))
    reused_fraction: float = field(default=0.15, metadata=_by(_fraction(0.0, 0.9)))
    lookup_deadline_ms: int = field(
        default=1_000, metadata=_by(_whole(1, MAX_DEADLINE_MS, "milliseconds"))
    )
    runtime_dir: str | None = field(default=None, metadata=_by(_folder))

    def __post_init__(self) -> None:
        _read_all(self)
        if self.extent_bytes is not None:
            if self.extent_bytes % 4_096:
                raise ConfigError(
                    f"extent_bytes: expected a multiple of 4096, found {self.extent_bytes}"
                )
            if self.slab_bytes is not None and self.extent_bytes > self.slab_bytes:
                raise ConfigError(
                    f"extent_bytes: expected at most slab_bytes ({self.slab_bytes}), "
                    f"found {self.extent_bytes}"
                )
        _require_short_socket(self.runtime_dir, self.cluster_name)

    @classmethod
    def parse(cls, settings: Mapping[str, object]) -> Self:
        """Raises ConfigError for an unknown key (with the one that was meant) or a wrong value."""
        return _parse(cls, settings)

    def to_dict(self) -> dict[str, object]:
        """Plain data that parse() takes."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine. The same in its EngineCore and in all of its workers.

    socket_path: of the NodeStore; if None, it is found by node_id, and if that is None too, it
        is the only socket of the cluster in runtime_dir (see find_sockets).
    step_budget_ms: what all questions to the NodeStore may take of one scheduler step.
    break_even: fetch only what takes longer to compute, as far as both have been measured.
    model_tag: an operator's word that joins the namespace: other tags share nothing.
    load_early: begin to load a chain when its first blocks have come from a peer and the rest is on
        its way. If false, when all of it is there. None: see loads_early.
    chunk_tokens: what a block holds, where vLLM's configuration leaves it open.
    attached: set by kvray.attach(): the engine was running already.
    """

    cluster_name: str = field(default="default", metadata=_by(_cluster_name))
    socket_path: str | None = field(default=None, metadata=_by(_folder))
    node_id: str | None = field(default=None, metadata=_by(_node_id))
    runtime_dir: str | None = field(default=None, metadata=_by(_folder))
    lookup_deadline_ms: int = field(
        default=1_000, metadata=_by(_whole(1, MAX_DEADLINE_MS, "milliseconds"))
    )
    step_budget_ms: int = field(
        default=2, metadata=_by(_whole(1, MAX_STEP_BUDGET_MS, "milliseconds"))
    )
    model_tag: str = field(default="", metadata=_by(_text(MAX_TAG_CHARS)))
    load_early: bool | None = field(default=None, metadata=_by(_flag))
    store_answers: bool = field(default=True, metadata=_by(_flag))
    break_even: bool = field(default=True, metadata=_by(_flag))
    chunk_tokens: int | None = field(default=None, metadata=_by(_whole(1, 65_536, "tokens")))
    attached: bool = field(default=False, metadata=_by(_flag))

    def __post_init__(self) -> None:
        _read_all(self)
        if self.socket_path is not None and len(self.socket_path) > MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"socket_path: expected at most {MAX_SOCKET_PATH_BYTES} characters, "
                f"found {len(self.socket_path)}"
            )
        _require_short_socket(self.runtime_dir, self.cluster_name)

    @classmethod
    def parse(cls, settings: Mapping[str, object]) -> Self:
        """Raises ConfigError for an unknown key (with the one that was meant) or a wrong value."""
        return _parse(cls, settings)

    @property
    def loads_early(self) -> bool:
        """load_early; by default where the reads of the NodeStore and the copies of the engine each
        have a core of their own. On two cores they take it from one another: with load_early a peer
        hit of 115 MB took 126 ms, without 97 (benchmarks/ttft.py --model smollm2 --settings).
        """
        if self.load_early is not None:
            return self.load_early
        return (os.cpu_count() or 1) >= MIN_EARLY_CORES

    def to_dict(self) -> dict[str, object]:
        """Plain data that parse() takes, without what is at its default: it travels in vLLM's
        configuration, which vLLM logs.
        """
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        return {k: v for k, v in dataclasses.asdict(self).items() if v != defaults[k]}


def _parse(kind: type[T], settings: Mapping[str, object]) -> T:
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"expected a mapping of settings to {kind.__name__}, found {_shown(settings)}"
        )
    known = [entry.name for entry in dataclasses.fields(kind)]
    for key in settings:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
        raise ConfigError(f"unknown key {key!r} ({hint})")
    return kind(**cast("dict[str, Any]", dict(settings)))


def _read_all(settings: "Config | EngineConfig") -> None:
    """Check each field and put what was read in its place: called while it is being made."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if value is None and entry.default is None:
            continue
        try:
            object.__setattr__(settings, entry.name, entry.metadata["read"](value))
        except _Unfit as exc:
            advice = f" ({exc.advice})" if exc.advice else ""
            raise ConfigError(
                f"{entry.name}: expected {exc.expected}, found {_shown(value)}{advice}"
            ) from None


def _shown(value: object) -> str:
    text = repr(value)
    if len(text) > MAX_SHOWN_CHARS:
        text = f"{text[:MAX_SHOWN_CHARS]}..."
    return f"{text} ({type(value).__name__})"


def _require_short_socket(runtime_dir: str | None, cluster_name: str) -> None:
    if runtime_dir is None:
        return
    path_bytes = len(os.fsencode(socket_path(runtime_dir, cluster_name, "0" * NODE_NAME_CHARS)))
    if path_bytes > MAX_SOCKET_PATH_BYTES:
        excess = path_bytes - MAX_SOCKET_PATH_BYTES
        raise ConfigError(
            f"runtime_dir: expected a path at least {excess} bytes shorter, found "
            f"{runtime_dir!r}: a unix socket's path ends at {MAX_SOCKET_PATH_BYTES} bytes"
        )


# ---- defaults that depend on the machine


def default_slab_bytes(*, free_shm_bytes: int, available_memory_bytes: int) -> int:
    """Half of the free /dev/shm, but at most three tenths of the available memory; whole MiB.

    Raises ConfigError if that is less than MIN_SLAB_BYTES.
    """
    share = min(
        int(free_shm_bytes * DEFAULT_SHM_SHARE), int(available_memory_bytes * DEFAULT_MEMORY_SHARE)
    )
    slab_bytes = share // (1 << 20) * (1 << 20)
    if slab_bytes < MIN_SLAB_BYTES:
        raise ConfigError(
            f"slab_bytes: there is no room for a slab: {free_shm_bytes} bytes are free in "
            f"{SHM_FOLDER} and {available_memory_bytes} bytes of memory are available. Free some, "
            "mount a larger /dev/shm, or set slab_bytes"
        )
    return slab_bytes


def default_extent_bytes(slab_bytes: int) -> int:
    """A power of two of which at least MIN_DEFAULT_EXTENTS fit, between 64 KiB and 512 MiB.

    A chunk must fit an extent, and little should be left over. 128 tokens of a 405B model with
    grouped queries are 66 MB in bf16, of a 65B model without them 335 MB: both fit the 512 MiB
    that a slab of 16 GiB and more gets.
    """
    extent_bytes = MIN_EXTENT_BYTES
    while extent_bytes * 2 * MIN_DEFAULT_EXTENTS <= slab_bytes:
        extent_bytes *= 2
    return min(extent_bytes, MAX_DEFAULT_EXTENT_BYTES)


def default_runtime_dir() -> str:
    """$KVRAY_RUNTIME_DIR of this process, else a folder in /tmp; one a user, mode 0700.

    Engines and NodeStores of a host must come to the same answer, so nothing that differs
    between a login and a service ($XDG_RUNTIME_DIR, $TMPDIR) is looked at.
    """
    return os.environ.get("KVRAY_RUNTIME_DIR") or f"/tmp/kvray-{os.geteuid()}"


# ---- sockets. A node's id is in their names, so two clusters on one machine do not collide.


def socket_path(runtime_dir: str | None, cluster_name: str, node_id: str) -> str:
    """Of the NodeStore's socket, where its engines knock. runtime_dir: None takes the default."""
    return f"{runtime_dir or default_runtime_dir()}/{cluster_name}-{node_id[:NODE_NAME_CHARS]}.sock"


def find_sockets(config: EngineConfig) -> list[str]:
    """Where this engine's NodeStore may be listening: existing sockets only, sorted.

    More than one means that this host has several Ray nodes and node_id has to be set. Raises
    UntrustedError if another user could have put them there; who listens is asked when one
    connects.
    """
    if config.socket_path is not None:
        return [config.socket_path] if os.path.exists(config.socket_path) else []  # noqa: PTH110
    folder = config.runtime_dir or default_runtime_dir()
    try:
        check_private_folder(folder)
    except FileNotFoundError:
        return []
    if config.node_id is not None:
        path = socket_path(config.runtime_dir, config.cluster_name, config.node_id)
        return [path] if os.path.exists(path) else []  # noqa: PTH110 (pathlib is 10 ms to load)
    pattern = re.compile(rf"{re.escape(config.cluster_name)}-[0-9a-f]{{1,{NODE_NAME_CHARS}}}\.sock")
    names = os.listdir(folder)  # noqa: PTH208
    return sorted(f"{folder}/{name}" for name in names if pattern.fullmatch(name))
