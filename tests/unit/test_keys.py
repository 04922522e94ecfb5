"""Goal: engines share blocks exactly when all that changes the bytes is equal.

Method: known answers (the format must not change by accident), and every near miss we could think
of: numbers that look alike, nesting, zeros at the end, salts.
"""

from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvray.core.ids import Maker, Namespace
from kvray.core.keys import (
    CANARY_CHUNKS,
    MAX_SALT_BYTES,
    block_key,
    block_keys,
    canary_keys,
    difference,
    namespace_digest,
)

FIELDS: dict[str, Any] = {
    "model": "SmolLM2-135M",
    "dtype": "bfloat16",
    "config": {"rope_theta": 10_000.0, "layers": 30, "groups": [{"page_bytes": 1_024}]},
    "revision": None,
}
NAMESPACE = namespace_digest(FIELDS)
OTHER = namespace_digest({**FIELDS, "dtype": "float16"})
HASHES = [bytes([i]) * 36 for i in range(200)]

plain: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)
field_sets = st.dictionaries(st.text(max_size=3), plain, max_size=4)


def test_the_digests_are_what_they_were_in_the_first_release() -> None:
    assert NAMESPACE.hex() == "dd74b86f48245f59731c0a02cbb21661"
    assert block_key(NAMESPACE, HASHES[1]).hex() == "91f9bbd7e99c1fa44f5099364ae813f1"
    assert block_key(NAMESPACE, HASHES[1], b"adapter").hex() == "c7cba86114f9bb770f45f16948db5051"


def test_a_block_key_is_a_keyed_blake2b_and_the_fast_path_says_the_same() -> None:
    plain_hash = blake2b(HASHES[1], digest_size=16, key=NAMESPACE + b"adapter").digest()
    assert block_key(NAMESPACE, HASHES[1], b"adapter") == plain_hash
    assert block_keys(NAMESPACE, HASHES, b"s") == [block_key(NAMESPACE, h, b"s") for h in HASHES]
    assert block_keys(NAMESPACE, []) == []


def test_the_keys_of_a_canary_are_those_of_one_maker_group_and_chunk() -> None:
    """Salts of requests are digests, of another length."""
    namespaces = [Namespace(bytes([n]) * 16) for n in range(2)]
    cases = [(space, Maker(m), g) for space in namespaces for m in (1, 2**63) for g in range(2)]
    keys = [key for case in cases for key in canary_keys(*case)]
    assert len(set(keys)) == len(keys) == len(cases) * CANARY_CHUNKS
    assert canary_keys(namespaces[0], Maker(1), 0, 1) == canary_keys(namespaces[0], Maker(1), 0)[:1]


def test_namespace_hash_and_salt_each_change_the_key() -> None:
    # Salts that end in zeros, the empty one among them, are all different.
    salts = [b"", b"\0", b"\0\0", b"a", b"a\0", bytes(MAX_SALT_BYTES)]
    keys = [
        block_key(namespace, offload_key, salt)
        for namespace in (NAMESPACE, OTHER)
        for offload_key in HASHES
        for salt in salts
    ]
    assert len(set(keys)) == len(keys) == 2 * len(HASHES) * len(salts)
    assert {len(key) for key in keys} == {16}


def test_the_order_of_fields_does_not_matter_at_any_depth() -> None:
    shuffled = {name: FIELDS[name] for name in reversed(FIELDS)}
    shuffled["config"] = {name: FIELDS["config"][name] for name in reversed(FIELDS["config"])}
    assert namespace_digest(shuffled) == NAMESPACE
    assert difference(shuffled, FIELDS) == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (1, "1"),
        (None, "null"),
        (None, float("nan")),
        (float("inf"), "Infinity"),
        (0.0, -0.0),
        (2**64, float(2**64)),
        ([], {}),
        ([[1], 2], [1, [2]]),
        ("a\udcff", "a\\udcff"),
    ],
)
def test_values_that_look_alike_are_different_namespaces(one: Any, other: Any) -> None:
    assert namespace_digest({"x": one}) != namespace_digest({"x": other})
    assert difference({"x": one}, {"x": other}) == ["x"]


def test_a_tuple_is_a_list_since_json_in_between_must_not_matter() -> None:
    assert namespace_digest({"x": (1, (2,))}) == namespace_digest({"x": [1, [2]]})


def test_a_value_without_one_text_is_refused_by_name() -> None:
    for value in ({1, 2}, b"bytes", object()):
        with pytest.raises(TypeError, match=type(value).__name__):
            namespace_digest({"x": value})  # type: ignore[dict-item]


def test_the_difference_names_what_a_person_can_look_up() -> None:
    other: dict[str, Any] = {
        "model": "SmolLM2-135M",
        "dtype": "float16",
        "config": {"rope_theta": 10_000, "layers": 30, "groups": [], "bias": False},
        "tag": {"a": 1},
    }
    expected = ["config.bias", "config.groups", "config.rope_theta", "dtype", "revision", "tag"]
    assert difference(FIELDS, other) == expected
    assert difference(other, FIELDS) == expected


def test_a_namespace_or_salt_of_another_length_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        block_key(Namespace(bytes(15)), HASHES[0])
    with pytest.raises(AssertionError, match="49 bytes"):
        block_key(NAMESPACE, HASHES[0], bytes(MAX_SALT_BYTES + 1))


@given(field_sets, field_sets)
def test_there_is_a_difference_exactly_when_the_namespaces_differ(a: Any, b: Any) -> None:
    assert (difference(a, b) == []) == (namespace_digest(a) == namespace_digest(b))
    assert difference(a, b) == difference(b, a)
    assert difference(a, a) == []
