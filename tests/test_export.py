"""export.py: a format is what plain PEFT gives, is proven before it has its name, or is refused by name."""

import json
import os
import shutil
import sys
from unittest.mock import patch

import mlflow
import pytest
import torch
from conftest import ROOT, command, copy_project
from export_parts import CHATS, QWEN_SPLIT, ROWS, byte_level, write_adapter, write_base
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import ray_jobs.export
from qlora.config import BaseModelSettings
from qlora.data.examples import examples_digest, load_examples
from qlora.data.prompts import PROMPT_FOLDER, encode_examples, load_prompt
from qlora.served import load_merged
from tracking import logged_model, registry
from tracking import store as tracking_store
from workflows import session
from workflows.export.vllm import reduce_rank


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base("llama", tmp_path_factory.mktemp("export") / "llama", byte_level())


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base):
    return write_adapter(base, tmp_path_factory.mktemp("export") / "adapter")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "chats.json"
    path.write_text(json.dumps(CHATS), encoding="utf-8")
    return path


def exported(monkeypatch, model, output, *options) -> int:
    """Run the command here; returns its exit code."""
    arguments = ("--model", model, "--output", output, *options)
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    with patch.dict(os.environ), pytest.raises(SystemExit) as end:
        session.run(ray_jobs.export.main)
    return end.value.code or 0


def oracle(base, adapter, quantization="nf4", dtype=None):
    """Return base and adapter as PEFT merges them in float32, its weights rounded to a dtype."""
    settings = BaseModelSettings(name=str(base), quantization=quantization, dtype="float32")
    model = load_merged(settings, str(adapter)).eval()
    return model if dtype is None else rounded(model, dtype)


@torch.no_grad()
def rounded(model, dtype):
    """Round the weights; positions stay as they are."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.randint(5, 290, (1, 40), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


def result(output) -> dict:
    return json.loads((output / "export.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["rows", "chats"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merged_folder_has_the_values_that_were_tuned_on(
    kind, dtype, request, monkeypatch, capsys, base, adapter, tmp_path
):
    output = tmp_path / "out"
    options = ("--format", "merged", "--dtype", dtype, "--data", request.getfixturevalue(kind))
    assert exported(monkeypatch, adapter, output, *options) == 0
    model = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    wanted = logits(oracle(base, adapter, dtype=model.dtype))
    torch.testing.assert_close(logits(model.float()), wanted, rtol=1e-3, atol=1e-4)
    figures = result(output)["figures"]
    assert abs(figures["difference"]) < 0.01 and figures["count"] == 8
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template == byte_level().chat_template
    ends = GenerationConfig.from_pretrained(output).eos_token_id
    assert ends == (2 if kind == "rows" else [2, 4]), "chats end at <|im_end|>"
    assert (output / "chat_template.jinja").is_file()
    out = capsys.readouterr().out
    assert "gives the champion's tokens for all 8 examples" in out
    assert f"-> {output}" in out
    assert not list(tmp_path.glob(".*")), "nothing unfinished is left"


def test_a_base_without_nf4_is_merged_as_peft_does(monkeypatch, base, adapter, rows, tmp_path):
    options = ("--format", "merged", "--data", rows, "--quantization", "none", "--dtype", "float16")
    assert exported(monkeypatch, adapter, tmp_path / "out", *options) == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(found), logits(rounded(merged, torch.float16)), rtol=1e-3, atol=1e-4)


def test_experts_stay_beside_merged_attention(monkeypatch, rows, tmp_path):
    base = write_base("qwen3_moe", tmp_path / "base", byte_level(QWEN_SPLIT))
    adapter = write_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "o_proj"])
    options = ("--format", "merged", "--dtype", "float16", "--data", rows)
    assert exported(monkeypatch, adapter, tmp_path / "out", *options) == 0
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    wanted = oracle(base, adapter, dtype=torch.float16)
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-3, atol=1e-2)


def test_the_bases_own_weights_are_exported_on_request_and_the_difference_told(
    monkeypatch, capsys, base, adapter, rows, tmp_path
):
    output = tmp_path / "out"
    options = ("--format", "merged", "--data", rows, "--original-weights")
    assert exported(monkeypatch, adapter, output, *options) == 0
    found = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    wanted = oracle(base, adapter, quantization="none", dtype=torch.bfloat16)
    torch.testing.assert_close(logits(found), logits(wanted), rtol=1e-3, atol=1e-4)
    told = f"{result(output)['figures']['difference']:+.2%} off the champion, as asked for"
    assert told in capsys.readouterr().out
    assert told in (output / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["rows", "chats"])
def test_an_adapter_for_vllm_is_the_same_in_peft(kind, request, monkeypatch, base, adapter, tmp_path):
    output = tmp_path / "out"
    options = ("--format", "vllm", "--data", request.getfixturevalue(kind))
    assert exported(monkeypatch, adapter, output, *options) == 0
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = logits(PeftModel.from_pretrained(plain, str(output)))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(found, logits(PeftModel.from_pretrained(plain, str(adapter))))
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"vllm serve {base} --enable-lora --lora-modules adapter=FOLDER --max-lora-rank 8" in card
    assert "--quantization bitsandbytes" in card
    assert ("/v1/chat/completions" if kind == "chats" else "/v1/completions") in card


def test_the_prompt_of_a_card_has_the_tokens_that_the_adapter_was_trained_on(
    monkeypatch, base, adapter, rows, tmp_path
):
    output = tmp_path / "out"
    assert exported(monkeypatch, adapter, output, "--format", "vllm", "--data", rows) == 0
    card = (output / "README.md").read_text(encoding="utf-8")
    body = json.loads(card.partition(" -d '")[2].partition("'\n")[0])
    tokenizer = AutoTokenizer.from_pretrained(base)
    asked = load_prompt().render("Hello")
    ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
    assert ids == [1, *tokenizer(asked, add_special_tokens=False)["input_ids"]]
    assert body["stop_token_ids"] == [2]


def test_an_adapter_that_has_a_lower_rank_is_reduced_without_loss(monkeypatch, base, adapter, rows, tmp_path):
    folder, output = tmp_path / "adapter", tmp_path / "out"
    write_adapter(base, folder)
    matrices = load_file(folder / "adapter_model.safetensors")
    for name in matrices:
        if ".lora_A." in name:
            matrices[name][2:] = 0
    save_file(matrices, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    options = ("--format", "vllm", "--data", rows, "--rank", "2")
    assert exported(monkeypatch, folder, output, *options) == 0
    assert load_file(output / "adapter_model.safetensors").popitem()[1].shape.count(2) == 1
    assert "rank 2 leaves out 0.00% of the adapter's Frobenius norm" in result(output)["notes"][0]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = logits(PeftModel.from_pretrained(plain, str(output)))
    torch.testing.assert_close(found, logits(oracle(base, folder, "none")), rtol=1e-3, atol=1e-4)


def test_a_reduction_is_the_best_of_its_rank_and_keeps_scales_of_layers():
    """Compared with singular values of the whole products."""
    generator = torch.Generator().manual_seed(0)
    names = {"q_proj": (4, 8), "k_proj": (6, 12)}  # rank, alpha
    matrices = {}
    for name, (rank, _) in names.items():
        matrices[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 20, generator=generator)
        matrices[f"base_model.model.{name}.lora_B.weight"] = torch.randn(30, rank, generator=generator)
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"k_proj": 6}, alpha_pattern={"k_proj": 12}).to_dict()
    squared_all = squared_lost = 0.0
    for rank in (6, 3):
        reduced = reduce_rank(config, matrices, rank)
        for name, (own, alpha) in names.items():
            A, B = (matrices[f"base_model.model.{name}.lora_{one}.weight"].double() for one in "AB")
            product = alpha / own * B @ A
            left, values, right = torch.linalg.svd(product, full_matrices=False)
            best = left[:, :rank] * values[:rank] @ right[:rank]
            a, b = (reduced.matrices[f"base_model.model.{name}.lora_{one}.weight"].double() for one in "AB")
            assert a.shape[0] == b.shape[1] == rank
            torch.testing.assert_close(b @ a, best, rtol=1e-4, atol=1e-4)
            if rank == 3:
                squared_all += float((values**2).sum())
                squared_lost += float((values[rank:] ** 2).sum())
    assert reduced.lost == pytest.approx((squared_lost / squared_all) ** 0.5)


def test_an_export_that_is_off_by_more_than_one_percent_leaves_nothing(
    monkeypatch, capsys, base, rows, tmp_path
):
    strong = write_adapter(base, tmp_path / "adapter", rank=16, std=0.3)
    code = exported(monkeypatch, strong, tmp_path / "out", "--format", "vllm", "--data", rows, "--rank", "1")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (code, error.startswith("failed: loaded back, the export has public perplexity")) == (1, True)
    assert "more than 1% (rank 1 leaves out" in error
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_and_is_made_again(monkeypatch, tmp_path, base, adapter, rows):
    copy_project(tmp_path / "project")
    failpoints, output = tmp_path / "failpoints", tmp_path / "out"
    failpoints.mkdir()
    (failpoints / "kill").write_text("export put into place before 1")
    options = ("--format", "vllm", "--data", rows)
    arguments = map(str, ("--model", adapter, "--output", output, *options))
    process = command(tmp_path / "project", "export", *arguments, env={"QLORA_FAILPOINTS": str(failpoints)})
    process.communicate(timeout=300)
    assert process.returncode == -9
    assert not output.exists()
    assert (tmp_path / ".out.part" / "export").is_dir()
    assert exported(monkeypatch, adapter, output, *options) == 0
    assert result(output)["figures"]["count"] == 8
    assert not list(tmp_path.glob(".*"))


@pytest.fixture
def version(tmp_path, monkeypatch, base, adapter):
    """A registered version whose sweep has left its public examples under results/."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    (tmp_path / "results" / "night").mkdir(parents=True)
    public = tmp_path / "results" / "night" / "public.jsonl"
    public.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    digest = examples_digest(load_examples(str(public), need_output=True))
    yield registered(base, adapter, digest, PROMPT_FOLDER / "zero-shot.yaml")
    mlflow.set_tracking_uri(None)


def registered(base, adapter, digest, prompt, name="course", **facts) -> str:
    client = tracking_store.connect()
    run = client.create_run(tracking_store.ensure_experiment(client, name)).info.run_id
    code = [ROOT / "qlora", ROOT / "inference"]
    files = logged_model.ModelFiles(adapter, prompt, ROOT / "deploy" / "served_model.py", code)
    facts = {
        "base_model": str(base),
        "quantization": "none",
        "sweep": "night",
        "prompt": prompt.stem,
        **facts,
    }
    settings = {key: facts[key] for key in ("base_model", "quantization")}
    uri = logged_model.log_model(run, files, settings, "翻譯：春", {})
    facts |= {"prompt_digest": load_prompt(str(prompt)).digest}
    return registry.register(name, uri, run, 5.0, digest, facts).model_uri


def test_another_adapter_at_the_same_place_is_not_taken_for_what_was_exported(
    base, monkeypatch, capsys, write_rows, tmp_path
):
    place, output = write_adapter(base, tmp_path / "adapter"), tmp_path / "out"
    options = ("--format", "vllm", "--data", write_rows(ROWS))
    assert exported(monkeypatch, place, output, *options) == 0
    assert exported(monkeypatch, place, output, *options) == 0, "it is there, and told again"
    shutil.rmtree(place)
    write_adapter(base, place, std=0.02)
    assert exported(monkeypatch, place, output, *options) == 2
    assert "is there already; name a folder that is not" in capsys.readouterr().err


def test_a_version_is_exported_on_its_own_examples_and_linked(version, monkeypatch, capsys, tmp_path):
    """The public examples, the prompt and the base are the version's own; the same command again records."""
    output = tmp_path / "out"
    options = ("--format", "vllm")
    assert exported(monkeypatch, "models:/course@champion", output, *options) == 0
    found = result(output)["settings"]
    assert (found["model"], found["prompt"], found["quantization"]) == (version, "zero-shot", "none")
    assert found["data"] == str(tmp_path / "results" / "night" / "public.jsonl")
    assert "--quantization" not in (output / "README.md").read_text(encoding="utf-8")

    def uses() -> list:
        client = tracking_store.connect()
        experiment = tracking_store.ensure_experiment(client, "course")
        found = client.search_runs([experiment], "tags.kind = 'export'")
        return [client.get_run(run.info.run_id) for run in found]

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (use,) = uses()
    assert (use.info.status, use.data.tags["model_uri"], use.data.tags["format"]) == (
        "FINISHED",
        version,
        "vllm",
    )
    assert use.data.metrics["export_perplexity"] == result(output)["figures"]["export_perplexity"]
    assert len(use.inputs.model_inputs) == 1
    assert exported(monkeypatch, "models:/course@champion", output, *options) == 0
    assert len(uses()) == 1
    capsys.readouterr()
    assert exported(monkeypatch, "models:/course@champion", output, "--format", "merged") == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "results" / "night" / "public.jsonl").write_text(json.dumps(ROWS[0]), encoding="utf-8")
    assert exported(monkeypatch, "models:/course@champion", tmp_path / "new", *options) == 2
    assert "holds other examples than the version was measured on" in capsys.readouterr().err


def test_encoded_examples_are_scored_as_the_metric_says(base, rows):
    from oracles import loop_perplexities

    from workflows.export.scored import plain_perplexities

    examples = load_examples(str(rows), need_output=True)
    encoded = encode_examples(AutoTokenizer.from_pretrained(base), load_prompt(), examples, str(rows))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = plain_perplexities(model, encoded, lambda done, total: None)
    assert found == pytest.approx(loop_perplexities(model, encoded), rel=1e-4)
