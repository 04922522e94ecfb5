"""What kvray.serve says where an application is described, before anything is started.

Goal: a wrong setting, a missing package, another Ray and an engine that kvray would refuse are told
here, each with what to do, and not by a replica that Serve restarts. Method: the functions
themselves; and, where Ray Serve LLM is installed, its own LLMConfig.
"""

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

import kvray
from kvray.engine.arguments import CONNECTOR
from kvray.engine.versions import TESTED
from kvray.errors import ConfigError, NotAttachedError
from kvray.serve import app

ROOT = Path(kvray.__file__).parent


def test_an_engine_gets_kvrays_connector_and_its_settings() -> None:
    transfer = app.transfer_config({}, {"model_tag": "v2", "lookup_deadline_ms": 1_000})

    assert CONNECTOR.items() <= transfer.items()
    assert transfer["kv_connector_extra_config"] == {"kvray": {"model_tag": "v2"}}


def test_what_was_set_for_kvray_already_stays_and_the_later_setting_wins() -> None:
    first = app.transfer_config({}, {"model_tag": "v1", "step_budget_ms": 5})
    first["engine_id"] = "mine"

    second = app.transfer_config({"kv_transfer_config": first}, {"model_tag": "v2"})

    assert second["engine_id"] == "mine"
    assert second["kv_connector_extra_config"]["kvray"] == {"model_tag": "v2", "step_budget_ms": 5}


def test_an_engine_with_another_connector_is_not_taken_over() -> None:
    other = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}

    with pytest.raises(ConfigError, match=r"found 'NixlConnector'.*leave kvray out"):
        app.transfer_config(other, {})


def test_an_unknown_setting_names_the_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'model_tag'"):
        app.transfer_config({}, {"modeltag": "v2"})


@pytest.mark.parametrize(
    "refused",
    [
        {"pipeline_parallel_size": 2},
        {"decode_context_parallel_size": 2},
        {"speculative_config": {"method": "ngram"}},
        {"kv_cache_dtype": "fp8_e4m3"},
        {"kv_cache_dtype": "int8_per_token_head"},
    ],
)
def test_an_engine_that_kvray_would_refuse_is_refused_at_once(refused: dict[str, Any]) -> None:
    (name,) = refused

    with pytest.raises(NotAttachedError, match=f"not tested with {name}="):
        app.refuse_untested({"max_model_len": 4_096, **refused})

    app.refuse_untested({"tensor_parallel_size": 2, "pipeline_parallel_size": 1, "dtype": "auto"})


@pytest.mark.parametrize("version", ["2.59.1", "2.61.0", "3.0.0.dev0"])
def test_another_ray_is_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "__version__", version)
    with pytest.raises(ConfigError, match=rf"tested with Ray 2\.60.*runs Ray {version}"):
        app.require_serve_llm()


def test_without_ray_serve_llm_the_error_says_what_to_install() -> None:
    """In a process of its own, where that import fails; importing kvray.serve does not."""
    script = """
import sys
sys.modules["ray.serve.llm"] = None
import kvray.serve
try:
    kvray.serve.build_openai_app({"llm_configs": []})
except kvray.MissingPackageError as exc:
    print(exc)
"""
    said = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    assert "pip install 'ray[llm]~=2.60.0'" in said.stdout


def test_nothing_but_kvray_serve_imports_ray_serve() -> None:
    script = "import sys, kvray; [getattr(kvray, name) for name in kvray.__all__]; "
    script += "import kvray.serve; print([m for m in sys.modules if m.startswith('ray.serve')])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    assert loaded.strip() == b"[]"

    asking = {
        path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py") if imports_ray_serve(path)
    }
    assert asking == {"serve"}


def imports_ray_serve(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(f"{name}.".startswith(("ray.serve.", "ray.llm.")) for name in names):
            return True
    return False


def test_the_extra_brings_the_pair_that_was_tested() -> None:
    assert TESTED["0.29.0"] == "1.3.2"  # what ray[llm] of app.TESTED_RAY pins


# ---- with Ray Serve LLM


@pytest.mark.ray_llm
@pytest.mark.heavy
def test_enable_changes_an_llm_config_and_registers_the_backend() -> None:
    from ray.llm._internal.serve.engines.vllm.kv_transfer.factory import KVConnectorBackendFactory
    from ray.serve.llm import LLMConfig

    from kvray.serve.backend import KVRayBackend

    config = LLMConfig(model_loading_config={"model_id": "m"}, engine_kwargs={"max_model_len": 64})

    assert kvray.serve.enable(config, model_tag="v2") is config
    kvray.serve.enable(config)  # a second time: what was set stays

    transfer = config.engine_kwargs["kv_transfer_config"]
    assert transfer["kv_connector_extra_config"] == {"kvray": {"model_tag": "v2"}}
    engine = config.get_engine_config()
    assert engine is not None
    assert engine.engine_kwargs["kv_transfer_config"] == transfer
    assert KVConnectorBackendFactory.get_backend_class("KVRayConnector") is KVRayBackend


@pytest.mark.ray_llm
@pytest.mark.heavy
def test_an_application_from_yaml_gets_kvray_in_each_of_its_configs() -> None:
    """As `import_path: kvray.serve:build_openai_app` with args; refused before it is built."""
    fast = {"model_loading_config": {"model_id": "a"}}
    odd = {
        "model_loading_config": {"model_id": "b"},
        "engine_kwargs": {"pipeline_parallel_size": 2},
    }

    with pytest.raises(NotAttachedError, match="pipeline_parallel_size=2"):
        kvray.serve.build_openai_app({"llm_configs": [fast, odd]})
    with pytest.raises(ConfigError, match="did you mean 'model_tag'"):
        kvray.serve.build_openai_app({"llm_configs": [fast], "kvray": {"modeltag": "v2"}})
    with pytest.raises(ConfigError, match="expected a mapping"):
        kvray.serve.build_openai_app({"llm_configs": [fast], "kvray": "v2"})
