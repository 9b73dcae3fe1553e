"""Real clusters whose nodes are processes of this machine: an autoscaler's, or with files of their own."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.cluster_utils import Cluster
from servers import free_port

RAY = Path(sys.executable).with_name("ray")
_HEAD = "ray.head.default"
_COMMANDS = (  # of a launcher, which Ray wants to see though nothing runs them here
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@contextmanager
def growing(
    folder: Path, kinds: dict[str, dict[str, Any]], max_workers: int = 2, is_stuck: bool = False, **env: str
) -> Iterator[str]:
    """Within: the address of a head without CPUs, to which Ray's autoscaler adds nodes of these kinds.

    A kind has `resources` and `max_workers`. Its nodes may claim GPUs that there are not. `is_stuck`: whether
    those that it starts never come. `env`: the head's.
    """
    file, port = folder / "autoscaling.json", free_port()
    types = {name: {"node_config": {}, "min_workers": 0, **kind} for name, kind in kinds.items()}
    config = {
        "cluster_name": "fake",
        "max_workers": max_workers,
        "idle_timeout_minutes": 5,
        "upscaling_speed": 4,
        "provider": {
            "type": "fake_multinode",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "use_node_id_as_ip": True,
            "gcs_address": f"127.0.0.1:{1 if is_stuck else port}",
        },
        "auth": {},
        "available_node_types": {
            _HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            **types,
        },
        "head_node_type": _HEAD,
        "file_mounts": {},
        **{key: [] for key in _COMMANDS},
    }
    file.write_text(json.dumps(config))
    start = [RAY, "start", "--head", "--num-cpus=0", "--num-gpus=0", "--block"]
    start += [f"--port={port}", f"--autoscaling-config={file}", "--include-dashboard=false"]
    quiet = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    inherited = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    with open(folder / "head.log", "w") as log:
        head = subprocess.Popen(start, env={**inherited, **quiet, **env}, stdout=log, stderr=log)
    try:
        wait_for_port(port)
        yield f"127.0.0.1:{port}"
    finally:
        kill_all(head)


def wait_for_port(port: int) -> None:
    """Wait until something listens there."""
    deadline = time.monotonic() + 60
    while not any(one.laddr.port == port for one in psutil.net_connections("tcp") if one.status == "LISTEN"):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def kill_all(head: subprocess.Popen) -> None:
    """End a process with all that it has started."""
    for process in (*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait()


def needs_mounts() -> None:
    """Skip the test unless this process may give another one a file system of its own."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("needs the right to mount")


def unpacking_alone(session: Path) -> list[Any]:
    """Return what goes before a worker's command, so that it unpacks jobs' files for itself.

    Nodes of one machine share the session's folder. Each one that runs a job's work for the first time
    removes what others have unpacked, though processes run in it, and unpacks it anew.
    """
    own = 'mkdir -p "$0" && mount -t tmpfs tmpfs "$0" && exec "$@"'
    return ["unshare", "-m", "sh", "-c", own, session / "runtime_resources"]


@contextmanager
def apart(*covered: tuple[Path, str], cpus: int = 2, **env: str) -> Iterator[str]:
    """Within: the address of a head without CPUs that has one worker, which sees files of its own.

    `covered`: paths, and what a shell makes of each for the worker alone, as `$0`. `env`: the worker's.
    """
    with headed() as nodes:
        nodes.add(*covered, cpus=cpus, **env)
        yield nodes.address


@dataclass
class Nodes:
    """A head without CPUs, and workers, each with a Ray of its own on this machine."""

    cluster: Cluster
    workers: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self, *covered: tuple[Path, str], cpus: int = 1, **env: str) -> subprocess.Popen:
        """Start a worker, see `apart`, and wait until it has joined."""
        start: list[Any] = [RAY, "start", f"--address={self.address}", f"--num-cpus={cpus}", "--block"]
        for path, script in covered:
            start = ["sh", "-c", f'{script} && exec "$@"', path, *start]
        alone = unpacking_alone(Path(self.cluster.head_node.get_session_dir_path()))
        environment = {**os.environ, **env}
        before = self._num_cpus()
        worker = subprocess.Popen([*alone, *start], env=environment, stdout=subprocess.DEVNULL)
        self.workers.append(worker)
        deadline = time.monotonic() + 60
        while self._num_cpus() < before + cpus:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return worker

    def _num_cpus(self) -> float:
        ray.init(address=self.address, log_to_driver=False, ignore_reinit_error=True)
        return ray.cluster_resources().get("CPU", 0)


@contextmanager
def headed() -> Iterator[Nodes]:
    """Within: a head without CPUs, to which workers can be added."""
    needs_mounts()
    nodes = Nodes(Cluster(initialize_head=True, head_node_args={"num_cpus": 0}))
    try:
        yield nodes
    finally:
        ray.shutdown()
        for worker in nodes.workers:
            if worker.poll() is None:
                kill_all(worker)
        nodes.cluster.shutdown()
