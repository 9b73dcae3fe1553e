"""Batch inference streams its input, keeps what is done, and writes every row once, in order, whatever was
killed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Hub, tiny_model
from test_inputs import refused
from test_rows import ROWS, write

import ray_jobs.batch_infer
from inference.job import open_job
from qlora.config import BaseModelSettings, InputError, TrialSettings
from qlora.lora.bank import load_bank

PROJECT = Path(__file__).resolve().parent.parent


def options_of(tiny_base: Path | str, source: Path, output: Path) -> list[str]:
    return [
        "--base-model",
        str(tiny_base),
        "--quantization",
        "none",
        "--input",
        str(source),
        "--output",
        str(output),
        "--max-new-tokens",
        "24",
    ]


def infer(tiny_base: Path | str, source: Path, output: Path, *options: str) -> subprocess.Popen:
    arguments = [*options_of(tiny_base, source, output), *options]
    return subprocess.Popen(
        [sys.executable, str(PROJECT / "ray_jobs/batch_infer.py"), *arguments],
        cwd=output.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == code, out
    return out


def error_line(out: str) -> str:
    assert "Traceback" not in out
    lines = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, out
    return lines[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """400 rows; row 7 has a prompt that no model of ours takes."""
    rows = [{"id": f"r{n}", "instruction": f"翻譯第{n}句", "output": "甲"} for n in range(400)]
    rows[7]["instruction"] = "長" * 2000
    return write(tmp_path_factory.mktemp("rows") / "many.jsonl", rows, lines=True)


@pytest.fixture(scope="module")
def expected(tiny_base, many) -> list[dict[str, str]]:
    """Generate what a job must write by one engine, without Ray. The row that fails is empty."""
    from inference.engine import ServedModel, load_engine
    from qlora.base.model import load_tokenizer
    from qlora.config import BaseModelSettings, DecodingSettings
    from qlora.data.prompts import encode_prompt, load_prompt

    base = BaseModelSettings(name=str(tiny_base), quantization="none")
    engine = load_engine(ServedModel(base), DecodingSettings(max_new_tokens=24))
    tokenizer, prompt = load_tokenizer(base.name), load_prompt()
    rows = [json.loads(line) for line in many.read_text(encoding="utf-8").splitlines()]
    sound = rows[:7] + rows[8:]
    prompts = [encode_prompt(tokenizer, prompt.render(row["instruction"])) for row in sound]
    texts = {sound[index]["id"]: text for index, text, _ in engine.generate(prompts)}
    return [{"id": row["id"], "output": texts.get(row["id"], "")} for row in rows]


def wait_for_rows(folder: Path, count: int) -> None:
    journal, started = folder / ".out.json.work/journal.jsonl", time.monotonic()
    while not journal.exists() or journal.read_bytes().count(b"\n") <= count:
        assert time.monotonic() - started < 120, "no rows came"
        time.sleep(0.05)


def processes_of(process: subprocess.Popen, name: str) -> list[int]:
    """Processes of Ray actors with this in their name among a command's descendants."""
    listing = subprocess.run(
        ["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[1:]
    parents = {int(pid): int(parent) for pid, parent, *_ in map(str.split, listing)}

    def descends(pid: int) -> bool:
        return pid == process.pid or (pid in parents and descends(parents[pid]))

    return [
        int(line.split()[0])
        for line in listing
        if "ray::" in line and name in line and descends(int(line.split()[0]))
    ]


@pytest.mark.slow
def test_killed_workers_and_drivers_lose_no_finished_row(
    expected, tiny_base, many, tmp_path, capsys, monkeypatch
):
    """Every row comes out once, in order, as if nothing had happened; the row that fails is told apart."""
    output = tmp_path / "out.json"
    first = infer(tiny_base, many, output)
    wait_for_rows(tmp_path, 20)
    workers = processes_of(first, "EngineActor")
    assert workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    wait_for_rows(tmp_path, 60)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    assert not output.exists()

    changed = refused(
        ray_jobs.batch_infer,
        capsys,
        monkeypatch,
        *options_of(tiny_base, many, output),
        "--num-beams",
        "2",
        "--resume",
    )
    assert "another generation settings" in changed
    out = finish(infer(tiny_base, many, output, "--resume"), code=4)
    assert "1 FAILED" in out.splitlines()[-1]
    generated = int(out.splitlines()[-1].split("(")[1].split()[0])
    assert generated < 350
    assert output.read_text(encoding="utf-8") == json.dumps(expected, ensure_ascii=False, indent=1) + "\n"
    assert [row["id"] for row in expected if not row["output"]] == ["r7"]
    meta = json.loads(output.with_name("out.json.meta.json").read_text())
    assert (meta["rows"], meta["rows_generated"], meta["rows_failed"], meta["scores"]["count"]) == (
        400,
        generated,
        1,
        399,
    )
    assert [error["id"] for error in json.loads(output.with_name("out.json.errors.json").read_text())] == [
        "r7"
    ]
    assert not output.with_name(".out.json.work").exists()


def test_two_jobs_on_one_output_are_refused(tmp_path):
    source = write(tmp_path / "in.json", ROWS)
    with (
        open_job(source, tmp_path / "out.json"),
        pytest.raises(InputError, match="being written by another job"),
        open_job(source, tmp_path / "out.json"),
    ):
        pass


@pytest.mark.slow
def test_a_base_that_no_engine_can_load_is_told_in_one_line(tiny_base, tmp_path):
    damaged = Path(shutil.copytree(tiny_base, tmp_path / "damaged"))
    (damaged / "model.safetensors").write_bytes(b"cut off")
    out = finish(infer(damaged, write(tmp_path / "in.json", ROWS), tmp_path / "out.json"), code=2)
    assert error_line(out).startswith(f"error: {damaged}: can't be loaded")


@pytest.mark.slow
def test_an_adapter_that_fits_no_engine_is_told_in_one_line(tiny_base, tmp_path):
    bank = load_bank(BaseModelSettings(name=str(tiny_base)))
    bank.save(bank.attach(TrialSettings(lora_r=4)), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    source = write(tmp_path / "in.json", ROWS)
    out = finish(infer(tiny_base, source, tmp_path / "out.json", f"--adapter={tmp_path / 'adapter'}"), code=2)
    assert error_line(out).startswith(f"error: {tmp_path / 'adapter'}: doesn't fit this base: size mismatch")


@pytest.mark.slow
def test_a_seeded_sample_survives_a_resume(tiny_base, many, tmp_path):
    """A row's draws don't depend on the rows beside it."""
    sampling = ("--num-beams", "1", "--do-sample", "--seed", "5", "--top-k", "20")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    finish(infer(tiny_base, many, whole / "out.json", *sampling, "--resume"), code=4)  # of nothing: it begins
    first = infer(tiny_base, many, parts / "out.json", *sampling)
    wait_for_rows(parts, 20)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    finish(infer(tiny_base, many, parts / "out.json", *sampling, "--resume"), code=4)
    assert (whole / "out.json").read_bytes() == (parts / "out.json").read_bytes()


@pytest.mark.slow
def test_a_job_goes_on_with_the_commit_of_a_hub_base_that_it_began_with(
    expected, tiny_base, many, tmp_path, monkeypatch
):
    """The hub's main branch has moved on: refused, unless the commit is named."""
    hub = Hub(tmp_path / "hub", tiny_base, tiny_base)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub.folder))
    output = tmp_path / "out.json"
    first = infer("team/tiny", many, output)
    wait_for_rows(tmp_path, 20)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    hub.move_to(1)
    out = finish(infer("team/tiny", many, output, "--resume"), code=2)
    assert "holds rows of a job with another model" in error_line(out)
    finish(infer(f"team/tiny@{hub.commits[0]}", many, output, "--resume"), code=4)
    assert json.loads(output.read_text()) == expected
    assert json.loads((tmp_path / "out.json.meta.json").read_text())["base_revision"] == hub.commits[0]


def test_a_family_that_the_search_lacks_is_served_by_generate(tmp_path, caplog):
    from conftest import byte_tokenizer
    from transformers import AutoModelForCausalLM, MambaConfig

    from inference.engine import BeamEngine, TransformersEngine, make_engine
    from qlora.config import DecodingSettings

    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    engine = make_engine(mamba, byte_tokenizer(), DecodingSettings(num_beams=1, max_new_tokens=4))
    assert isinstance(engine, TransformersEngine)
    assert caplog.text.count("using transformers.generate") == 1
    assert sorted(index for index, *_ in engine.generate([(1, 5, 6), (1, 7)])) == [0, 1]
    assert isinstance(make_engine(tiny_model("llama"), byte_tokenizer(), DecodingSettings()), BeamEngine)


def test_a_family_whose_prompts_would_begin_otherwise_is_served_by_generate(caplog, monkeypatch):
    """The pass that reads a prompt gives the first token, and what its last layer attends nothing else."""
    from conftest import byte_tokenizer, tiny_model

    from inference.cached_attention import PrefillPass
    from inference.engine import TransformersEngine, make_engine
    from qlora.config import DecodingSettings

    plain = PrefillPass.attend

    def attend(self, layer, *arguments):
        found = plain(self, layer, *arguments)
        return found * 0 if layer == 1 else found

    monkeypatch.setattr(PrefillPass, "attend", attend)
    engine = make_engine(tiny_model("llama"), byte_tokenizer(), DecodingSettings(max_new_tokens=4))
    assert isinstance(engine, TransformersEngine)
    assert caplog.text.count("using transformers.generate") == 1


def test_a_family_that_fails_at_its_first_forward_is_served_by_generate(caplog):
    """Attention sinks are not in a config: that they can't be served shows when attention is called."""
    from conftest import SIZE, byte_tokenizer
    from transformers import GptOssConfig, GptOssForCausalLM

    from inference.engine import TransformersEngine, make_engine
    from qlora.config import DecodingSettings

    torch.manual_seed(0)
    config = GptOssConfig(
        **SIZE, head_dim=16, num_local_experts=2, num_experts_per_tok=1, attn_implementation="eager"
    )
    model = GptOssForCausalLM(config).eval()
    ids = torch.tensor([[1, 5, 6]])
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=4, pad_token_id=0
    )[0, 3:]
    engine = make_engine(model, byte_tokenizer(), DecodingSettings(max_new_tokens=4))
    assert isinstance(engine, TransformersEngine)
    assert "GptOssAttention" in engine.name
    assert caplog.text.count("using transformers.generate") == 1
    assert [text for _, text, _ in engine.generate([(1, 5, 6)])] == [
        byte_tokenizer().decode(expected, skip_special_tokens=True).strip()
    ]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_prompt_that_fails_costs_no_other(num_beams):
    """Whatever it raises: a token beyond the embedding is an IndexError."""
    from conftest import byte_tokenizer

    from inference.engine import make_engine
    from inference.failures import generate_each, is_sound
    from qlora.config import DecodingSettings

    model, decoding = tiny_model("llama"), DecodingSettings(max_new_tokens=4, num_beams=num_beams)
    engine = make_engine(model, byte_tokenizer(), decoding)
    sound, bad = [[1, 5, 6], [1, 7], [1, 8, 9]], [1, 99_999]
    expected = generate_each(engine, sound)
    assert all(count and not error for _, count, error in expected)
    found = generate_each(engine, [sound[0], bad, *sound[1:], bad])
    assert [found[0], *found[2:4]] == expected
    assert [found[1], found[4]] == [("", 0, "IndexError: index out of range in self")] * 2
    assert is_sound(engine), "it is the prompts' fault, also if all of them fail"
    model.lm_head = None
    assert not is_sound(engine)


@pytest.mark.parametrize("engine_name", ["BeamEngine", "TransformersEngine"])
def test_outputs_end_where_answers_end_in_training(engine_name):
    """At the tokenizer's EOS, though the model's generation config names another token, in either engine."""
    from conftest import byte_tokenizer

    from inference.engine import make_engine
    from qlora.config import DecodingSettings

    model, tokenizer = tiny_model("llama"), byte_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 6.0
    model.generation_config.eos_token_id = 9
    if engine_name == "TransformersEngine":
        model.generation_config.repetition_penalty = 1.01  # which the search lacks
    engine = make_engine(model, tokenizer, DecodingSettings(max_new_tokens=40))
    assert type(engine).__name__ == engine_name
    counts = [count for _, _, count in engine.generate([(1, 5 + n, 6) for n in range(12)])]
    assert min(counts) < 40


@pytest.mark.ray
def test_a_pool_has_one_engine_an_accelerator(monkeypatch):
    """A GPU each, wherever they are; a node each where there are none."""
    import ray
    from ray.cluster_utils import Cluster

    from inference.pipeline import Pool
    from workflows.cluster.capacity import look_at_capacity
    from workflows.cluster.pool import plan_pool as plan

    def plan_pool(*options: int, device: str | None = None) -> Pool:
        return plan(look_at_capacity({}), *options, device=device)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # Ray checks what its nodes claim to have
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        with pytest.raises(InputError, match="Ray has 0 CPU and no GPU, so that no engine has a place"):
            plan_pool()
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        assert plan_pool() == Pool(2, False)
        with pytest.raises(InputError, match="--device: gpu was asked for, but Ray has 0 GPU"):
            plan_pool(device="gpu")
        cluster.add_node(num_cpus=1, num_gpus=2)
        assert plan_pool() == Pool(2, True)
        assert plan_pool(device="cpu") == Pool(3, False)
        assert plan_pool(1) == Pool(1, True)
        with pytest.raises(InputError, match="--workers: 3 engines need a GPU each, and Ray has room for 2"):
            plan_pool(3)
    finally:
        ray.shutdown()
        cluster.shutdown()
