"""Count the processes of the clusters that JAX recognises, from their documented variables and services."""

import importlib.util
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
KUBERNETES_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def has_tpu() -> bool:
    """Return whether this machine has a TPU that JAX can use."""
    return importlib.util.find_spec("libtpu") is not None and any(
        True for form in ("accel*", "vfio/*") for _ in Path("/dev").glob(form))


def metadata(key: str) -> str | None:
    """Return an attribute of this machine from Google's metadata server; None if it has none of that name."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{server}/computeMetadata/v1/instance/attributes/{key}",
                                     headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def _slices() -> int:
    """Return the number of slices of a TPU run."""
    if "MEGASCALE_NUM_SLICES" in os.environ:
        return int(os.environ["MEGASCALE_NUM_SLICES"])
    for line in (metadata("tpu-env") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "MEGASCALE_NUM_SLICES":
            return int(value.strip().strip("'"))
    return 1


def _gke_workers() -> list[str]:
    return (os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES") or "").split(",")


def _count_gke_tpu() -> int:
    """Count the workers of a TPU slice; the only one, as in Colab, may have nobody to ask for more slices."""
    workers = _gke_workers()
    return 1 if len(workers) == 1 and "MEGASCALE_NUM_SLICES" not in os.environ else len(workers) * _slices()


def _is_gce_tpu() -> bool:
    try:
        return has_tpu() and "TPU_SKIP_MDS_QUERY" not in os.environ and metadata("agent-worker-number") is not None
    except OSError:  # no such server: not a machine of Google's
        return False


def _is_kubernetes() -> bool:
    """Return whether this is a pod that can be asked; JAX too needs the package `kubernetes`."""
    try:
        return "KUBERNETES_SERVICE_HOST" in os.environ and importlib.util.find_spec("kubernetes") is not None
    except ValueError:  # blocked
        return False


def _count_kubernetes() -> int:
    """Ask the cluster for the parallelism of this pod's job; a pod outside an indexed Job is alone."""
    if "JOB_COMPLETION_INDEX" not in os.environ:
        return 1
    import kubernetes

    kubernetes.config.load_incluster_config()
    namespace = KUBERNETES_NAMESPACE.read_text().strip()
    address = socket.gethostbyname(os.environ["HOSTNAME"])
    (pod,) = kubernetes.client.CoreV1Api().list_namespaced_pod(
        namespace=namespace, field_selector=f"status.podIP={address}").items
    return kubernetes.client.BatchV1Api().read_namespaced_job(
        name=pod.metadata.labels["job-name"], namespace=namespace).spec.parallelism


CLUSTERS: tuple[tuple[str, Callable[[], bool], Callable[[], int]], ...] = (
    ("Open MPI", lambda: "OMPI_MCA_orte_hnp_uri" in os.environ, lambda: int(os.environ["OMPI_COMM_WORLD_SIZE"])),
    ("SLURM", lambda: all(name in os.environ for name in SLURM), lambda: int(os.environ["SLURM_NTASKS"])),
    ("TPU workers", lambda: _gke_workers() != [""], _count_gke_tpu),
    ("Google Cloud TPU", _is_gce_tpu, lambda: len((metadata("worker-network-endpoints") or "").split(",")) * _slices()),
    ("Kubernetes", _is_kubernetes, _count_kubernetes),
)
"""Name, whether this process is in such a cluster, and its number of processes; in the order in which JAX asks."""
