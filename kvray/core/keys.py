"""What a block is called: 16 bytes that name exactly one content.

    namespace = BLAKE2b-128(canonical JSON of all that changes the bytes of a block)
    key       = BLAKE2b-128(vLLM's OffloadKey: block hash and group index), keyed with
                namespace + salt

Two engines share a block if, and only if, fields, OffloadKey and salt are equal. Which fields there
are is the engine's knowledge; nothing here knows vLLM.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TypeAlias

from kvray.core.ids import KEY_BYTES, NAMESPACE_BYTES, BlockKey, Maker, Namespace

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

CANARY_CHUNKS = 2  # of each cache group: the second confirms what the first has shown
MAX_SALT_BYTES = 48  # with the 16 bytes of a namespace it fills BLAKE2b's key of 64


def namespace_digest(fields: Mapping[str, Json]) -> Namespace:
    """The namespace of engines with these fields. The order of names does not matter.

    Raises TypeError for a value that is not plain: its text might differ from process to process.
    """
    # person: no other digest over the same bytes can be taken for a namespace.
    digest = blake2b(_canonical(fields), digest_size=NAMESPACE_BYTES, person=b"kvray namespace")
    return Namespace(digest.digest())


def block_key(namespace: Namespace, offload_key: bytes, salt: bytes = b"") -> BlockKey:
    """salt: what a request adds to the namespace, such as a digest of its LoRA adapter's files."""
    return block_keys(namespace, (offload_key,), salt)[0]


def block_keys(
    namespace: Namespace, offload_keys: Iterable[bytes], salt: bytes = b""
) -> list[BlockKey]:
    """block_key of each. 0.27 us a key; 0.42 if each is begun from nothing."""
    assert len(namespace) == NAMESPACE_BYTES
    assert len(salt) <= MAX_SALT_BYTES, f"a salt of {len(salt)} bytes; at most {MAX_SALT_BYTES}"
    # The length of BLAKE2b's key is part of the hash, and that of the namespace is fixed: so no two
    # pairs of namespace and salt run into one another, whatever zeros they end in.
    begun = blake2b(digest_size=KEY_BYTES, key=namespace + salt)
    keys = []
    for offload_key in offload_keys:
        digest = begun.copy()
        digest.update(offload_key)
        keys.append(BlockKey(digest.digest()))
    return keys


def canary_keys(
    namespace: Namespace, maker: Maker, group: int, chunk_count: int = CANARY_CHUNKS
) -> list[BlockKey]:
    """Of the chunks of the canary that this maker has computed, in one cache group. Who knows the
    maker knows the keys: so nodes find each other's canaries as they find any block.
    """
    chunks = [group.to_bytes(4, "big") + n.to_bytes(4, "big") for n in range(chunk_count)]
    return block_keys(namespace, chunks, b"canary" + maker.to_bytes(8, "big"))


def difference(fields_a: Mapping[str, Json], fields_b: Mapping[str, Json]) -> list[str]:
    """The names of what differs, sorted, inner ones with dots; empty if the namespaces are equal.

    A name that only one side has is one of them; of that name, nothing inside is listed.
    """
    names = []
    for name in sorted(fields_a.keys() | fields_b.keys()):
        if name not in fields_a or name not in fields_b:
            names.append(name)
            continue
        a, b = fields_a[name], fields_b[name]
        if _canonical(a) == _canonical(b):
            continue
        inner = difference(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) else []
        names.extend(f"{name}.{part}" for part in inner)
        if not inner:
            names.append(name)
    return names


def _canonical(value: Json) -> bytes:
    """One text for one value: 1, 1.0, True and "1" differ, [1] and (1,) do not.

    The standard library's json and not msgspec's, which writes NaN and None alike, bytes as text,
    and refuses integers beyond 64 bits.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_refuse)
    return text.encode("ascii")


def _refuse(value: object) -> object:
    raise TypeError(f"{value!r} is a {type(value).__name__}; a namespace is made of plain values")
