"""Where hosts are: one a node and device, found by all who hold a share of it, replaced when it dies."""

import os
import signal
import time

import psutil
import pytest
import ray
from conftest import random_examples
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tuning.host import SweepData
from tuning.host_directory import begin_hosts, host_of_my_device, start_hosts
from tuning.space import Space

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def nodes():
    """Two nodes with a CPU each, besides the head."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    found = [cluster.add_node(num_cpus=1).node_id for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    yield found
    ray.shutdown()
    cluster.shutdown()


@ray.remote(num_cpus=0.5)
def host_process(hosts) -> int:
    return ray.get(host_of_my_device(hosts).process_id.remote())


def wait_for_its_end(process: int) -> None:
    """Until a process is gone; a test that waits for ever has failed."""
    deadline = time.monotonic() + 60
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_device_has_one_host_and_a_dead_one_is_replaced(nodes, tiny_base):
    space = Space.model_validate(
        {
            "base_model": {"name": str(tiny_base), "quantization": "none"},
            "data": {"train": "t", "public": "p"},
            "search": {"lora_r": {"choice": [4]}},
        }
    )
    examples = random_examples(4, vocabulary=250)
    hosts = start_hosts()
    begin_hosts(hosts, SweepData(space, examples, examples))

    def processes() -> list[int]:
        """Of the hosts found by two holders on each node, asking at once."""
        return ray.get(
            [
                host_process.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
                ).remote(hosts)
                for node in nodes
                for _ in range(2)
            ]
        )

    first = processes()
    assert first[0] == first[1] != first[2] == first[3]
    os.kill(first[0], signal.SIGKILL)
    wait_for_its_end(first[0])
    second = processes()
    assert second[0] == second[1] not in first
    assert second[2:] == first[2:]
