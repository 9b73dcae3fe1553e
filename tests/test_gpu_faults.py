"""A process takes a GPU's memory in the middle of a sweep: trials go on in smaller passes, or come back."""

import subprocess
import sys

import pytest
import torch
import yaml
from conftest import byte_tokenizer, command, finished
from test_sweep import ledger, wait_for_a_report
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.ray, pytest.mark.slow]
THIEF = """
import time, torch
for turn in range(3):
    taken, size = [], 4 << 30
    while size > 1 << 20:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            size //= 2
    print("took", sum(map(len, taken)) >> 20, "MiB", flush=True)
    time.sleep(15)
    del taken
    torch.cuda.empty_cache()
    time.sleep(5)
"""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_that_is_taken_in_the_middle_of_a_sweep(project, tmp_path):
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    space = yaml.safe_load((project / "space.yaml").read_text())
    space["base_model"] = {"name": str(tmp_path / "base"), "quantization": "nf4"}
    space["search"] = {"learning_rate": {"choice": [1e-4]}, "epochs": {"choice": [60]}}
    space |= {"num_samples": 8, "scheduler": {"type": "fifo"}, "trials_per_gpu": 2}
    (project / "large.yaml").write_text(yaml.safe_dump(space))
    finished(command(project, "tune", "--space", "large.yaml", "--name", "whole"))
    process = command(project, "tune", "--space", "large.yaml", "--name", "robbed")
    wait_for_a_report(process, project, "robbed")
    thief = subprocess.run([sys.executable, "-c", THIEF], capture_output=True, text=True, check=False)
    was_running = process.poll() is None
    out = finished(process)
    print(thief.stdout, thief.stderr[-500:], f"sweep outlasted it: {was_running}")
    print("\n".join(line for line in out.splitlines() if line.startswith("note ")))
    found, whole = ledger(project, "robbed"), ledger(project, "whole")
    assert {record["status"] for record in found.values()} == {"finished"}
    assert found.keys() == whole.keys()
    for trial_id, record in found.items():
        expected = whole[trial_id]["curve"][-1]["public_perplexity"]
        assert record["curve"][-1]["public_perplexity"] == pytest.approx(expected, rel=0.05)
