"""What serves an adapter elsewhere, whole: `mlflow models serve`, and exports of the embedded base."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import mlflow
import pytest
from conftest import ROOT
from export_parts import byte_level, write_adapter, write_base
from test_export import exported, registered, result

from inference.engine import ServedModel, load_engine
from qlora.base.model import load_tokenizer
from qlora.base.reference import embedded_base_folder
from qlora.config import BaseModelSettings, DecodingSettings
from qlora.data.examples import examples_digest, load_examples
from qlora.data.prompts import PROMPT_FOLDER, load_prompt
from qlora.data.row_shapes import Turn
from qlora.data.split import as_row

pytestmark = pytest.mark.slow


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A tracking store and a sweep's public examples of this test's own."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("QLORA_HOME", str(tmp_path))
    yield uri
    mlflow.set_tracking_uri(None)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answer(port: int, body: dict, process: subprocess.Popen, log) -> dict:
    """Ask a server until it is up."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    end = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=120) as found:
                return json.load(found)
        except (ConnectionError, urllib.error.URLError):
            assert process.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(1)


@pytest.mark.parametrize("prompt", ["default", "chat"])
def test_mlflow_serves_what_the_engine_generates(prompt, store, tmp_path):
    base = write_base("llama", tmp_path / "base", byte_level())
    adapter = write_adapter(base, tmp_path / "adapter")
    uri = registered(base, adapter, "d", PROMPT_FOLDER / f"{prompt}.yaml", prompt_kind=prompt)
    port, asked = free_port(), ["翻譯：春風", "the north"]
    serve = (sys.executable, "-m", "mlflow", "models", "serve", "-m", uri)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # mlflow looks for uvicorn
    log = (tmp_path / "serve.log").open("w", encoding="utf-8")
    process = subprocess.Popen(
        [*serve, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)],
        cwd=tmp_path,
        env={**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": "", "PATH": path},
        start_new_session=True,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        body = {"dataframe_records": [{"instruction": text} for text in asked]}
        params = {"num_beams": 2, "max_new_tokens": 6}
        found = answer(port, body | {"params": params}, process, tmp_path / "serve.log")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # the server's own workers are of its session
        process.wait(timeout=60)
        log.close()
    settings = BaseModelSettings(name=str(base), quantization="none")
    tokenizer, own = load_tokenizer(str(base)), load_prompt(prompt)
    decoding = DecodingSettings(**params)
    engine = load_engine(ServedModel(settings, str(adapter)), decoding, own.end_ids(tokenizer))
    prompts = [own.ids(tokenizer, [Turn("user", text)]) for text in asked]
    wanted = {index: text for index, text, _ in engine.generate(prompts)}
    assert found == {"predictions": [{"output": wanted[0]}, {"output": wanted[1]}]}


@pytest.mark.parametrize("kind", ["default", "chat"])
def test_the_embedded_base_is_exported_in_every_format(kind, store, monkeypatch, capsys, tmp_path):
    name = "smollm2-135m-instruct"
    adapter = write_adapter(embedded_base_folder(), tmp_path / "adapter", rank=12, std=0.004)
    sample = load_examples(str(ROOT / "data" / "sample" / "public_test.json"), need_output=True)[:4]
    rows = [as_row(example) for example in sample]
    if kind == "chat":
        turns = (("user", "instruction"), ("assistant", "output"))
        rows = [{"messages": [{"role": role, "content": row[key]} for role, key in turns]} for row in rows]
    public = tmp_path / "results" / "night" / "public.jsonl"
    public.parent.mkdir(parents=True)
    public.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    digest = examples_digest(load_examples(str(public), need_output=True))
    prompt = PROMPT_FOLDER / f"{kind}.yaml"
    uri = registered(name, adapter, digest, prompt, quantization="nf4")
    formats = [("merged",), ("gguf",)]
    if kind == "default":
        formats += [("vllm",), ("vllm", "--rank", "4"), ("gguf", "--gguf-type", "q8_0")]
    for options in formats:
        output = tmp_path / "-".join(options)
        assert exported(monkeypatch, uri, output, "--format", *options) == 0, capsys.readouterr().err
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
        assert abs(result(output)["figures"]["difference"]) < 0.01
