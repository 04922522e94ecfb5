"""Goal: what is said to be taken, and to be refused, is what is. Method: by code, for each name
that this vLLM has.
"""

from pathlib import Path

import pytest

from kvray.engine import versions
from kvray.engine.arguments import SHOWN_CACHE_DTYPES
from tests.coverage.rows import Kind, Row, Verdict, all_rows
from tests.coverage.table import table

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return all_rows()


def names(rows: list[Row], kind: Kind, verdict: Verdict) -> set[str]:
    return {row.name for row in rows if (row.kind, row.verdict) == (kind, verdict)}


def test_every_name_that_vllm_has_is_taken_or_refused_by_name(rows: list[Row]) -> None:
    assert names(rows, Kind.CACHE_DTYPE, Verdict.EQUAL) == set(SHOWN_CACHE_DTYPES)
    assert names(rows, Kind.CACHE_GROUP, Verdict.EQUAL) == {
        "FullAttentionSpec",
        "SlidingWindowSpec",
    }
    refused = names(rows, Kind.CACHE_DTYPE, Verdict.REFUSED)
    assert refused >= {"fp8", "nvfp4", "int8_per_token_head", "turboquant_k8v4"}
    refused = names(rows, Kind.CACHE_GROUP, Verdict.REFUSED)
    assert refused >= {"MLAAttentionSpec", "MambaSpec", "ChunkedLocalAttentionSpec"}


def test_what_a_loader_of_its_own_has_loaded_has_no_name(rows: list[Row]) -> None:
    unnamed = names(rows, Kind.LOAD_FORMAT, Verdict.UNNAMED)
    assert unnamed >= {"tensorizer", "modelexpress"}
    named = names(rows, Kind.LOAD_FORMAT, Verdict.NAMED)
    assert named >= {"auto", "safetensors", "pt", "sharded_state", "dummy", "runai_streamer"}


def test_readme_says_what_the_command_makes(rows: list[Row]) -> None:
    if versions.installed_version() != "0.32.0":
        pytest.skip("README's table is of vLLM 0.32")
    assert table(rows) in (ROOT / "README.md").read_text()
