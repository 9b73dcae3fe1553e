"""Tiny real parts: a byte-level tokenizer and two-layer decoders built from configs.

Nothing is fetched, nothing is mocked.
"""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
if "gpu" not in " ".join(sys.argv).replace("not gpu", ""):  # the other tests see the same everywhere: no GPU
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton, which then needs no GPU

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from qlora.data.prompts import EncodedExample

ROOT = Path(__file__).resolve().parent.parent
# Triton before 3.9 can't interpret with NumPy of today ("only 0-dimensional arrays can be converted").
HAS_KERNELS = importlib.util.find_spec("triton") is not None and (
    torch.cuda.is_available() or tuple(map(int, version("triton").split(".")[:2])) >= (3, 9)
)
SIZE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZE),
    "qwen2": Qwen2Config(**SIZE),
    "qwen3": Qwen3Config(**SIZE, head_dim=16),
    "mistral": MistralConfig(**SIZE, sliding_window=16),
    "gemma2": Gemma2Config(
        **SIZE,
        head_dim=16,
        sliding_window=16,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
    ),
}


def tiny_model(family: str) -> PreTrainedModel:
    """A two-layer float32 decoder with weights large enough that attention matters, in transformers' own
    attention.
    """
    attention = "eager" if family == "gemma2" else "sdpa"  # soft-capping exists in eager only
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[family]), attn_implementation=attention, dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every UTF-8 byte is a token; BOS 1, EOS 2, PAD 0."""
    specials = ["<pad>", "<s>", "</s>"]
    vocabulary = {
        token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def random_examples(
    count: int, seed: int = 0, shared: int = 20, vocabulary: int = 300
) -> list[EncodedExample]:
    """Examples of unequal lengths whose prompts share their first `shared` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())

    prefix = (1, *tokens(shared - 1, shared))
    return [EncodedExample(str(i), prefix + tokens(1, 30), (*tokens(1, 25), 2)) for i in range(count)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local base folder: tiny Llama and byte tokenizer, as `save_pretrained` writes them."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path):
    """Write rows as a JSON data file and return its path."""

    def write(rows: object, name: str = "rows.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path

    return write


def copy_project(folder: Path) -> None:
    """Copy what commands need: results/ and mlruns/ of the working tree stay as they are."""
    rooms = ("qlora", "tuning", "inference", "tracking", "reporting", "workflows", "ray_jobs")
    for name in (*rooms, "prompts", "deploy"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


WORDS = "春夏秋冬東西南北山水風雲日月星辰"


def write_course(folder: Path) -> None:
    """Write a small train.json and public.json."""
    rows = [
        {
            "id": f"e{n}",
            "instruction": f"翻譯：{WORDS[n % 16]}{WORDS[(n * 5) % 16]}",
            "output": WORDS[(n * 3) % 16],
        }
        for n in range(24)
    ]
    (folder / "train.json").write_text(json.dumps(rows[:16]), encoding="utf-8")
    (folder / "public.json").write_text(json.dumps(rows[16:]), encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_base):
    """A copy of the project with a space of its own."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder)
    write_course(folder)
    (folder / "plain.yaml").write_text('template: "問：{instruction} 答："', encoding="utf-8")
    space = {
        "prompt": "plain.yaml",
        "base_model": {"name": str(tiny_base), "quantization": "none"},
        "data": {"train": "train.json", "public": "public.json"},
        "trial": {"batch_size": 4, "lora_r": 4, "lora_dropout": 0.0},
        "search": {"learning_rate": {"choice": [1e-5, 1e-3, 1e-2, 3e-2]}, "epochs": {"choice": [2, "1+1"]}},
        "num_samples": 5,
        "registered_model": "tiny",
        "soup": False,  # a trial's own adapter is the best one, but in tests of averages
        "scheduler": {"type": "asha", "grace_period": 25, "reduction_factor": 2},
        "resources_per_trial": {"cpu": 1},
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space), encoding="utf-8")
    return folder


class Hub:
    """A hub's cache whose `team/tiny` has been at commits 000..., 111..., each a copy of a base."""

    def __init__(self, folder: Path, *bases: Path):
        self.folder, self.commits = folder, [str(number) * 40 for number in range(len(bases))]
        self._repository = folder / "models--team--tiny"
        for commit, base in zip(self.commits, bases, strict=True):
            shutil.copytree(base, self._repository / "snapshots" / commit)
        (self._repository / "refs").mkdir()
        self.move_to(0)

    def move_to(self, number: int) -> None:
        """Let the main branch be at a commit."""
        (self._repository / "refs/main").write_text(self.commits[number])


def command(
    project: Path, script: str, *arguments: str, env: dict[str, str] | None = None, **options
) -> subprocess.Popen:
    """Start a command of the project; `env` is added to this process's environment."""
    path = os.pathsep.join([str(project), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "MLFLOW_TRACKING_URI": "", **(env or {})}
    return subprocess.Popen(
        [sys.executable, f"ray_jobs/{script}.py", *arguments],
        cwd=project,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def finished(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out
