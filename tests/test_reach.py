"""A sweep on nodes that can't reach the place of its checkpoints is refused before a trial trains."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from conftest import command
from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def address(project):
    """A head without CPUs, and a worker with two that has other results/ than this machine."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    (project / "results").mkdir(exist_ok=True)
    start = [Path(sys.executable).with_name("ray"), "start", f"--address={cluster.address}", "--num-cpus=2"]
    alone = 'mount -t tmpfs tmpfs "$0" && exec "$@" --block'
    worker = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", alone, project / "results", *start],
        env={**os.environ, "PYTHONPATH": str(project)},
        stdout=subprocess.DEVNULL,
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        deadline = time.monotonic() + 60
        while ray.cluster_resources().get("CPU", 0) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        ray.shutdown()
        yield cluster.address
    finally:
        ray.shutdown()
        for process in psutil.Process(worker.pid).children(recursive=True):
            process.kill()
        worker.kill()
        worker.wait()
        cluster.shutdown()


def test_results_that_a_node_cannot_reach_and_a_folder_that_it_can(project, address, tmp_path):
    settings = ("--set", "num_samples=1", "--set", "search.epochs={choice: [1]}", "--name", "apart")

    def tune(*more: str) -> tuple[int, str]:
        arguments, environment = ("--space", "space.yaml", *settings, *more), {"RAY_ADDRESS": address}
        process = command(project, "tune", *arguments, env=environment)
        out, _ = process.communicate(timeout=300)
        return process.returncode, out

    code, out = tune()
    assert code == 2
    last = out.splitlines()[-1]
    assert last.startswith("error: storage: the node ")
    assert f"can't read and write at {project}/results/apart" in last
    assert last.endswith("give a place that all nodes reach, such as --set storage=s3://BUCKET/PATH")
    assert not (project / "results/apart").exists()
    code, out = tune("--set", f"storage={tmp_path}")
    assert code == 0, out
    found = json.loads((project / "results/apart/summary.json").read_text())
    assert [trial["status"] for trial in found["trials"]] == ["finished"]
    assert [path.name for path in (tmp_path / "apart").iterdir()] == ["ray"]
