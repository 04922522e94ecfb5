"""The files for KubeRay: pods that Kubernetes accepts, and around them what their readers need.

Readers: the schemas of Kubernetes; Ray's autoscaler, which reads a RayCluster; Ray Serve. No
package has KubeRay's own schemas, so the fields around the pods are compared with a list.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RAY_CLUSTER, RAY_SERVICE = (
    f"examples/clusters/kuberay-{kind}.yaml" for kind in ("raycluster", "rayservice")
)
NETWORK_POLICY = "examples/clusters/kuberay-networkpolicy.yaml"
KUBERNETES = "1.32"
NOT_TRIED = "# not tried: "

# Of ray.io/v1, KubeRay 1.5.1: those that are used here.
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = {
    *("groupName", "replicas", "minReplicas", "maxReplicas"),
    *HEAD_FIELDS,
}


def load(path: str) -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / path).read_text())
    assert isinstance(loaded, dict)
    return loaded


def cluster_spec(path: str) -> dict[str, Any]:
    spec: dict[str, Any] = load(path)["spec"]
    return spec if path == RAY_CLUSTER else spec["rayClusterConfig"]


def groups(path: str) -> list[dict[str, Any]]:
    spec = cluster_spec(path)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.fixture(params=[RAY_CLUSTER, RAY_SERVICE])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def pod(group: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", **group["template"]}


def test_what_nobody_has_tried_says_so_first(path: str) -> None:
    assert (ROOT / path).read_text().startswith(NOT_TRIED)


def test_kubernetes_accepts_every_pod(path: str) -> None:
    import kubernetes_validate  # in the environment of make test only

    for group in groups(path):
        kubernetes_validate.validate(pod(group), KUBERNETES, strict=True)


def test_the_network_policy_lets_nobody_but_the_nodes_to_any_port() -> None:
    import kubernetes_validate

    policy = load(NETWORK_POLICY)
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    every_port = [rule["from"] for rule in policy["spec"]["ingress"] if "ports" not in rule]
    assert every_port == [[{"podSelector": policy["spec"]["podSelector"]}]]
    assert (ROOT / NETWORK_POLICY).read_text().startswith(NOT_TRIED)


def test_kubernetes_would_refuse_a_misspelt_key(path: str) -> None:
    import kubernetes_validate

    wrong = copy.deepcopy(pod(groups(path)[1]))
    wrong["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_around_the_pods_are_known_fields_only(path: str) -> None:
    spec = cluster_spec(path)
    assert set(spec) == CLUSTER_FIELDS
    assert set(spec["headGroupSpec"]) == HEAD_FIELDS
    assert all(set(group) == WORKER_FIELDS for group in spec["workerGroupSpecs"])
    assert all(
        isinstance(value, str)
        for group in groups(path)
        for value in group["rayStartParams"].values()
    )
    kinds = {RAY_CLUSTER: "RayCluster", RAY_SERVICE: "RayService"}
    assert (load(path)["apiVersion"], load(path)["kind"]) == ("ray.io/v1", kinds[path])


def test_ray_reads_the_nodes_that_are_meant(path: str) -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    meta = load(path)["metadata"]
    read = autoscaling_config._derive_autoscaling_config_from_ray_cr  # noqa: SLF001 (what it reads)
    derived = read({"metadata": meta, "spec": cluster_spec(path)})
    head, worker = derived["available_node_types"].values()
    assert head["resources"]["CPU"] == 0
    assert worker["resources"]["GPU"] == 8
    assert worker["min_workers"] == worker["max_workers"] == 2


def test_every_pod_has_shared_memory_within_its_limit(path: str) -> None:
    for group in groups(path):
        spec = group["template"]["spec"]
        [volume] = spec["volumes"]
        [container] = spec["containers"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        shm, memory = (
            int(quantity.removesuffix("Gi"))
            for quantity in (
                volume["emptyDir"]["sizeLimit"],
                container["resources"]["limits"]["memory"],
            )
        )
        assert shm < memory


def test_the_head_starts_kvray_and_tokens_are_on(path: str) -> None:
    spec = cluster_spec(path)
    [head] = spec["headGroupSpec"]["template"]["spec"]["containers"]
    _, _, command = head["lifecycle"]["postStart"]["exec"]["command"]
    assert "kvray start" in command
    assert "RAY_ADDRESS=auto" in command
    assert spec["authOptions"] == {"mode": "token"}


def test_both_files_have_the_same_cluster() -> None:
    of_service = copy.deepcopy(cluster_spec(RAY_SERVICE))
    ports = of_service["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    assert ports.pop() == {"name": "serve", "containerPort": 8000}
    text = yaml.safe_dump(of_service).replace("kvray-llm:", "kvray:")
    assert yaml.safe_load(text) == cluster_spec(RAY_CLUSTER)


@pytest.mark.ray_llm
def test_ray_serve_accepts_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    serve = ServeDeploySchema.model_validate(
        yaml.safe_load(load(RAY_SERVICE)["spec"]["serveConfigV2"])
    )
    [application] = serve.applications
    assert application.import_path == "kvray.serve:build_openai_app"
