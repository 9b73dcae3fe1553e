"""What a Ray has room for, there and to come, and the plan of a sweep on devices of several kinds."""

from types import SimpleNamespace

import pytest
import requests
import yaml
from conftest import CONFIGS, ROOT
from ray.autoscaler._private.kuberay import node_provider
from test_plan import PUBLIC, SHAPES, TRAIN, space

from qlora.config import InputError
from tuning.device import Device
from tuning.model_size import model_size
from tuning.plan import make_plan
from tuning.plan_text import describe_plan
from tuning.sweep_plan import make_sweep_plan
from workflows.cluster.capacity import Capacity, NodeKind, kuberay_config, with_autoscaler
from workflows.cluster.waiting import check_place

HEAD = NodeKind({"CPU": 0, "node:__internal_head__": 1}, 1)
GPU, CPU = NodeKind({"CPU": 8, "GPU": 1}, 1), NodeKind({"CPU": 4}, 1)
A10G = NodeKind({"CPU": 8, "GPU": 1, "accelerator_type:A10G": 1}, 8)
H100 = NodeKind({"CPU": 16, "GPU": 8, "accelerator_type:H100": 1}, 2)
SHARE = {"CPU": 1.0, "GPU": 0.25}


def test_devices_that_may_come_are_counted_up_to_the_clusters_own_limit():
    assert Capacity((HEAD, GPU, GPU)).num_devices(SHARE) == 2
    growing = Capacity((HEAD,), (A10G, H100), most_workers=5, grows=True)
    assert growing.num_devices(SHARE) == 2 * 8 + 3
    assert growing.num_devices({**SHARE, "accelerator_type:A10G": 0.001}) == 5
    assert growing.num_devices({**SHARE, "accelerator_type:H100": 0.001}) == 16
    assert (
        Capacity((HEAD, A10G), (A10G,), most_workers=3, grows=True).num_devices(SHARE) == 8
    )  # there already
    large = {**SHARE, "CPU": 9.0}  # for which only one kind has room
    assert growing.num_devices(large) == 16
    with_gpu = NodeKind({"CPU": 0, "GPU": 1, "node:__internal_head__": 1}, 1)
    assert Capacity((with_gpu, GPU)).num_devices(SHARE) == 1  # a head without CPUs holds no trial
    assert Capacity((HEAD,), grows=True).num_devices(SHARE) == 1  # nobody says how far it grows
    assert Capacity((HEAD, GPU, GPU), grows=True).num_devices(SHARE) == 2


@pytest.mark.parametrize(
    ("capacity", "expected"),
    [
        (Capacity((HEAD, CPU, GPU)), True),
        (Capacity((HEAD, CPU)), False),
        (Capacity((HEAD, CPU), (A10G,), 8, grows=True), True),
        (Capacity((HEAD, CPU), (CPU,), 8, grows=True), False),
        (Capacity((HEAD,), grows=True), True),  # nobody says what may come, and there is nothing else
        (Capacity((HEAD, CPU), grows=True), False),
        (Capacity((HEAD, CPU, GPU), grows=True), True),
    ],
)
def test_gpus_are_taken_where_there_are_or_may_come_some(capacity, expected):
    assert capacity.may_have_gpus(1.0) == expected


def test_under_kuberay_the_cluster_says_how_far_it_grows(monkeypatch):
    """The operator's answer is the RayCluster of deploy/; a head that may not read it doesn't know."""
    cluster = yaml.safe_load((ROOT / "deploy/kuberay/cluster.yaml").read_text())
    cluster["metadata"]["namespace"] = "default"
    answer = SimpleNamespace(status_code=200, json=lambda: cluster, raise_for_status=lambda: None)
    monkeypatch.setattr(requests, "get", lambda *_, **__: answer)
    monkeypatch.setattr(node_provider, "load_k8s_secrets", lambda: ({}, "ca.crt", None))
    config = kuberay_config("qlora", "default")
    assert config is not None
    capacity = with_autoscaler((HEAD,), config)
    assert capacity.most({"GPU": 1.0}) == 8 and capacity.num_devices(SHARE) == 8
    assert not capacity.could_come({"CPU": 9.0}) and capacity.could_come({"CPU": 8.0, "GPU": 1.0})
    cluster["spec"]["enableInTreeAutoscaling"] = False
    assert kuberay_config("qlora", "default") is None

    def forbidden() -> None:
        raise requests.HTTPError("403 Forbidden")

    monkeypatch.setattr(
        requests, "get", lambda *_, **__: SimpleNamespace(status_code=403, raise_for_status=forbidden)
    )
    assert kuberay_config("qlora", "default") == {}


def test_nodes_are_devices_where_trials_need_no_gpu():
    cpu = {"CPU": 1.0, "GPU": 0.0}
    assert Capacity((HEAD, CPU, CPU, GPU)).num_devices(cpu) == 3
    assert Capacity((HEAD, CPU), (NodeKind({"CPU": 4}, 6),), most_workers=6, grows=True).num_devices(cpu) == 6


@pytest.mark.parametrize(
    ("capacity", "shares", "problem"),
    [
        (Capacity((HEAD, CPU)), {"CPU": 8.0, "GPU": 0.0}, "8 CPU, but Ray has 4 CPU; lower it with --set"),
        (Capacity((HEAD, CPU)), {"CPU": 1.0, "GPU": 1.0}, "1 GPU, but Ray has 0 GPU; .* trials_per_gpu=null"),
        (Capacity((HEAD, CPU)), SHARE, "0.25 GPU, but Ray has 0 GPU"),
        (Capacity((HEAD,), (CPU,), 1, grows=True), SHARE, "0.25 GPU, but Ray has 0 GPU"),
        (
            Capacity((HEAD,), (A10G,), 8, grows=True),
            {**SHARE, "accelerator_type:H100": 0.001},
            "no node has, or may have, a H100; name another kind of GPU",
        ),
        (
            Capacity((CPU, NodeKind({"CPU": 1, "GPU": 1}, 1))),
            {"CPU": 4.0, "GPU": 1.0},
            "all that a trial asks for: 4 CPU, 1 GPU",
        ),
    ],
    ids=["CPUs", "no GPU", "no share of one", "none can come", "a kind", "not on one node"],
)
def test_a_trial_that_nothing_could_place_is_refused(capacity, shares, problem):
    with pytest.raises(InputError, match=problem):
        check_place(capacity, shares)


@pytest.mark.parametrize(
    "capacity",
    [Capacity((HEAD, GPU)), Capacity((HEAD,), (A10G,), 8, grows=True), Capacity((HEAD,), grows=True)],
    ids=["there", "may come", "may grow, nobody knows how far"],
)
def test_a_trial_that_something_could_place_is_not(capacity):
    check_place(capacity, SHARE)


def test_each_kind_of_device_has_passes_of_its_own_and_all_trials_one_share():
    size, chosen = model_size(CONFIGS["llama"]), space(trials_per_gpu="auto")
    large = Device("cuda", 80 << 30, 1e14, name="H100")
    alone = make_plan(chosen, TRAIN, PUBLIC, size, large, 1)
    room = alone.base_bytes + 3 * alone.adapter_bytes + alone.activation_bytes // 4
    small = Device("cuda", (2 << 30) + room, 1e13, name="L4")
    both = make_sweep_plan(chosen, TRAIN, PUBLIC, size, [large, small], 2)
    assert set(both.kinds) == {"H100", "L4"}
    assert both.kinds["H100"].trials == both.kinds["L4"].trials == both.trials < alone.trials
    assert both.budgets["L4"] < both.budgets["H100"]
    on_large, on_small = (make_sweep_plan(chosen, TRAIN, PUBLIC, size, [one], 1) for one in (large, small))
    assert both.seconds < on_large.seconds < on_small.seconds
    words = describe_plan(chosen, TRAIN, PUBLIC, SHAPES, both)
    assert "device      1 x H100: " in words and "memory      1 x L4: " in words and "on 2 devices" in words


def test_trials_are_dealt_out_over_devices_of_all_kinds():
    size = model_size(CONFIGS["llama"])
    devices = [Device("cuda", 80 << 30, 1e14, name=name) for name in ("H100", "A100")]
    assert make_sweep_plan(space(trials_per_gpu="auto"), TRAIN, PUBLIC, size, devices, 2).trials == 4


def test_an_autoscalers_file_may_leave_out_what_ray_fills_in():
    types = {"head": {"resources": {"CPU": 8}}, "gpu": {"resources": {"CPU": 8, "GPU": 1}}}
    config = {"max_workers": 4, "head_node_type": "head", "available_node_types": types}
    assert with_autoscaler((HEAD,), config).most({"GPU": 1.0}) == 4
    own = {"local.node": {"resources": {}, "max_workers": 2}}  # as for machines that are there: not known
    config = {"max_workers": 2, "head_node_type": "local.node", "available_node_types": own}
    assert with_autoscaler((HEAD,), config).most({"GPU": 1.0}) is None


def test_a_kind_that_no_trial_fits_on_is_named():
    size = model_size(CONFIGS["llama"])
    devices = [Device("cuda", 80 << 30, 1e14, name="H100"), Device("cuda", (2 << 30) + 4096, 1e13, name="L4")]
    with pytest.raises(InputError, match=r"base_model: on L4: a trial needs .*; accelerator_type leaves"):
        make_sweep_plan(space(trials_per_gpu="auto"), TRAIN, PUBLIC, size, devices, 2)


def test_devices_to_come_are_in_the_plan():
    size, device = model_size(CONFIGS["llama"]), Device("cuda", 80 << 30, 1e14, name="H100")
    chosen = space(trials_per_gpu="auto")
    plan = make_sweep_plan(chosen, TRAIN, PUBLIC, size, [device], 4)
    assert plan.trials == make_plan(chosen, TRAIN, PUBLIC, size, device, 4).trials == 2
    words = describe_plan(chosen, TRAIN, PUBLIC, SHAPES, plan, num_there=1)
    assert "on 4 devices (1 there, the others may come)" in words


def test_a_nodes_own_cpus_say_how_many_trials_it_takes():
    device = Device("cpu", 8 << 30, 1e10, num_cpus=3)
    assert make_plan(space(), TRAIN, PUBLIC, model_size(CONFIGS["llama"]), device).trials == 3
