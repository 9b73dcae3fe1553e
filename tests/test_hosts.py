"""Where hosts are: one a node and device, found by all who hold a share of it, replaced when it dies."""

import importlib
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from clusters import RAY, kill_all
from conftest import random_examples
from ray.cluster_utils import Cluster

from tuning.device import Device
from tuning.examples import PromptedExamples, SweepExamples
from tuning.host import SweepData
from tuning.host_actor import UnfitNodeError
from tuning.host_directory import ask_all_devices, begin_hosts, host_of_my_device, start_hosts
from tuning.ledger import TrialRecord
from tuning.placement import Seat, on_node
from tuning.space import Space
from workflows.cluster.capacity import Capacity
from workflows.session import StoppedError
from workflows.sweep.end import SweepEnd
from workflows.sweep.start import StartedHosts
from workflows.worker import Spare, Worker

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def cluster():
    """A head without CPUs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield cluster
    cluster.shutdown()


@pytest.fixture
def nodes(cluster):
    """Two nodes with a CPU each, besides the head."""
    found = [cluster.add_node(num_cpus=1).node_id for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    yield found
    ray.shutdown()


def sweep_data(base: Path) -> SweepData:
    space = Space.model_validate(
        {
            "base_model": {"name": str(base), "quantization": "none"},
            "data": {"train": "t", "public": "p"},
            "search": {"lora_r": {"choice": [4]}},
        }
    )
    examples = random_examples(4, vocabulary=250)
    return SweepData(space, SweepExamples({"default": PromptedExamples(examples, examples)}))


def test_devices_are_those_of_nodes_that_answer(nodes):
    shares = {"CPU": 1.0, "GPU": 0.0}

    def started(*questions) -> StartedHosts:
        return StartedHosts(None, list(questions), 0.0, shares, Capacity(()), set(nodes))

    device = Device("cpu", 1 << 30, 1e9)
    good, broken = ray.remote(num_cpus=0)(lambda: device), ray.remote(num_cpus=0)(lambda: [][0])
    gone = ray.remote(num_cpus=0, max_retries=0)(lambda: os._exit(1))
    answers = started(broken.remote(), gone.remote(), good.remote()).found_devices(60)
    assert answers == [device]
    with pytest.raises(IndexError):
        started(broken.remote()).found_devices(60)
    with pytest.raises(StoppedError, match=r"the nodes that were asked are gone .*; run the same"):
        started(gone.remote()).found_devices(60)
    never = ray.remote(resources={"nowhere": 1})(lambda: device)
    with pytest.raises(StoppedError, match="has not come within 2 s; run the same command again"):
        started(never.remote()).found_devices(2)


def test_a_node_that_joins_while_others_are_busy_is_asked(cluster, nodes):
    """Two nodes whose CPUs others have; the third is another's to bring."""

    class Holder:
        def is_there(self) -> bool:
            return True

    holder = ray.remote(num_cpus=1)(Holder)
    held = [holder.options(scheduling_strategy=on_node(node)).remote() for node in nodes]
    ray.get([one.is_there.remote() for one in held])
    hosts, shares = start_hosts(), {"CPU": 1.0, "GPU": 0.0}
    questions = ask_all_devices(hosts, shares, "device")
    assert len(questions) == 2
    started = StartedHosts(hosts, questions, 0.0, shares, Capacity(()), set(nodes))
    join = f"sleep 3 && exec {RAY} start --address={cluster.address} --num-cpus=1 --block"
    newcomer = subprocess.Popen(["sh", "-c", join], stdout=subprocess.DEVNULL)
    try:
        assert [device.num_cpus for device in started.found_devices(90)] == [1]
    finally:
        kill_all(newcomer)
    assert len(started.questions) == 3


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
    hosts = start_hosts()
    begin_hosts(hosts, sweep_data(tiny_base))

    def processes() -> list[int]:
        """Return the processes of hosts that two holders on each node find, asking at once."""
        return ray.get(
            [
                host_process.options(scheduling_strategy=on_node(node)).remote(hosts)
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


class NeedsAModule:
    """Stands for a function of people's own whose module imports what a node lacks."""

    def __reduce__(self):
        return importlib.import_module, ("no_such_module",)


def test_a_node_that_lacks_what_a_function_imports_is_unfit(nodes, tiny_base):
    """It says so, and no trial is tried there again and again."""
    hosts, shares = start_hosts(), {"CPU": 1.0, "GPU": 0.0}
    begin_hosts(hosts, replace(sweep_data(tiny_base), judge=NeedsAModule()))
    with pytest.raises(UnfitNodeError, match=r"No module named 'no_such_module'; install there"):
        ray.get(ask_all_devices(hosts, shares, "zero_shot")[0])


def test_a_node_that_cannot_read_its_question_is_unfit(nodes, tiny_base):
    """As one that joins without this project's code."""
    hosts, shares = start_hosts(), {"CPU": 1.0, "GPU": 0.0}
    begin_hosts(hosts, sweep_data(tiny_base), NeedsAModule())
    with pytest.raises(UnfitNodeError, match="No module named 'no_such_module'; give it this"):
        ray.get(ask_all_devices(hosts, shares, "zero_shot")[0])


ONE_CPU = {"CPU": 1.0, "GPU": 0.0}


def held(node: str) -> ray.ObjectRef:
    """Hold a node's one CPU."""
    seat = ray.remote(Seat).options(num_cpus=1, scheduling_strategy=on_node(node)).remote()
    ray.get(seat.device.remote())
    return seat


def test_a_spare_does_the_work_of_a_worker_on_its_device(cluster, nodes):
    """And when the spare is gone, the worker does it with the shares that it holds."""
    spare = Spare(ONE_CPU, nodes[0])
    assert spare.place == (nodes[0], "cpu")
    other = held(nodes[1])
    worker = Worker(ONE_CPU, spare)
    process = ray.get(spare.actor.do.remote(os.getpid))
    assert worker.do(os.getpid) == process
    ray.kill(spare.actor)
    assert worker.do(os.getpid) != process
    del other


def test_a_worker_that_is_placed_elsewhere_leaves_the_spare_alone(cluster, nodes):
    seat = held(nodes[0])
    worker = Worker(ONE_CPU, Spare(ONE_CPU, nodes[0]))
    assert worker.do(lambda: ray.get_runtime_context().get_node_id()) == nodes[1]
    del seat


def test_the_process_of_a_sweeps_end_starts_once_all_trials_have_begun(cluster, nodes):
    told = []

    class Observer:
        def trial_changed(self, record: TrialRecord) -> None:
            told.append(record)

    end = SweepEnd(Observer(), ONE_CPU, lambda: 2)
    records = [
        TrialRecord(name, {}, status)
        for name, status in (("0", "running"), ("1", "pending"), ("0", "finished"), ("1", "running"))
    ]
    for record in records:
        assert end.spare is None
        end.trial_changed(record)
    assert told == records
    process = ray.get(end.spare.actor.do.remote(os.getpid))
    blocked = held(*(set(nodes) - {end.spare.place[0]}))
    assert end.worker().do(os.getpid) == process
    del blocked


@pytest.mark.parametrize("which", [0, 1])
def test_the_end_of_a_sweep_is_on_no_node_that_trials_left_out(cluster, nodes, which):
    """Also where its process was started there before that was known."""
    unfit = set[str]()
    end = SweepEnd(SimpleNamespace(trial_changed=lambda record: None), ONE_CPU, lambda: 1, lambda: unfit)
    end.trial_changed(TrialRecord("0", {}, "running"))
    unfit.add(nodes[which])
    worker = end.worker()
    assert worker.do(lambda: ray.get_runtime_context().get_node_id()) == nodes[1 - which]


def test_work_whose_node_or_process_goes_away_is_done_elsewhere(cluster, nodes, tmp_path):
    """As the proof of a sweep's best adapter, when the node that it runs on is lost."""

    def where(place: str = "") -> str:
        if place and not Path(place).exists():
            Path(place).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return ray.get_runtime_context().get_node_id()

    worker = Worker({"CPU": 1.0, "GPU": 0.0})
    first = worker.do(where, str(tmp_path / "killed"))
    assert (tmp_path / "killed").exists()
    cluster.remove_node(next(node for node in cluster.worker_nodes if node.node_id == first))
    assert worker.do(where) in set(nodes) - {first}
    del worker  # which has the one CPU that is left

    def ends() -> None:
        os._exit(1)

    with pytest.raises(ray.exceptions.ActorDiedError):
        Worker({"CPU": 1.0, "GPU": 0.0}).do(ends)
