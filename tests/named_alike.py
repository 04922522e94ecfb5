"""An engine that says of its ranks what it was told to say: names that know less than they could.

Equal names are what the canary and the audit are for, and since kvray names what is there, two
engines that differ do not have them any more. vLLM loads this module in each worker before the
model:

    facts = {name: a.call(in_engine.fields)[name] for name in FACTS}
    start_engine(..., environment={VARIABLE: json.dumps(facts)},
                 worker_extension_cls="tests.named_alike.NamedAlike")

Without the variable it changes nothing.
"""

import importlib
import json
import os
from typing import Any

VARIABLE = "KVRAY_TEST_FACTS"
FACTS = (
    "attention.backend",
    "attention.isa",
    "cache.layout",
    "cache.scales",
    "cache.specs",
    "weights",
)

_connector: Any = importlib.import_module("kvray.engine.connector")
_facts_of = _connector.facts_of


class NamedAlike:
    """Adds nothing to vLLM's worker but that this module is loaded."""


def _told(*layers_and_caches: Any, **named: Any) -> dict[str, Any]:
    found = _facts_of(*layers_and_caches, **named)
    assert found.keys() == set(FACTS), "facts that are not told would make another name"
    return {**found, **json.loads(os.environ[VARIABLE])}


if VARIABLE in os.environ:
    _connector.facts_of = _told
