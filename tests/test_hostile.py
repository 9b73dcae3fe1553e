"""Files from strangers: nothing in them runs, leaves its place, or reaches a page or a screen as it is."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from test_inputs import GOOD, nothing_heavy_happens, refused  # noqa: F401

import ray_jobs.evaluate
from qlora.checkpoint_files import CheckpointError, verify_checkpoint, write_manifest
from qlora.config import InputError
from qlora.data.examples import load_examples
from reporting import html
from tuning.space import checked_name


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path) -> Path:
    """A file that is there if somebody unpickled `payload.bin`, which is beside it."""
    path = tmp_path / "sprung"
    (tmp_path / "payload.bin").write_bytes(pickle.dumps(Payload(path)))
    yield path
    assert not path.exists(), "something was unpickled"


def evaluate(capsys, monkeypatch, tmp_path, write_rows, *options) -> str:
    data = write_rows(GOOD)
    arguments = ("--data", data, "--output", tmp_path / "o.json", *options)
    return refused(ray_jobs.evaluate, capsys, monkeypatch, *arguments)


def test_pickled_weights_of_a_base(trap, tiny_base, capsys, monkeypatch, tmp_path, write_rows):
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    shutil.copy(trap.with_name("payload.bin"), base / "pytorch_model.bin")
    error = evaluate(capsys, monkeypatch, tmp_path, write_rows, "--base-model", base)
    assert "holds no *.safetensors" in error


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("adapter_model.bin", "holds no adapter_model.safetensors"),
        ("adapter_model.safetensors", "is damaged"),
    ],
)
def test_pickled_weights_of_an_adapter(name, problem, trap, capsys, monkeypatch, tmp_path, write_rows):
    """Under their own name and under another's."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    shutil.copy(trap.with_name("payload.bin"), adapter / name)
    assert problem in evaluate(capsys, monkeypatch, tmp_path, write_rows, "--adapter", adapter)


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "..", ".", "a\nb", "a\x1b[2Jb", "", "-x/../y", "a\0b", "Ä" * 300]
)
def test_names_that_lead_elsewhere(name):
    with pytest.raises(ValueError, match="can't be a name"):
        checked_name(name)


@pytest.mark.parametrize("name", ["../sprung", "/etc/passwd", "a/../../sprung"])
def test_a_manifest_that_leads_elsewhere(name, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in ("optimizer.safetensors", "position.json"):
        (folder / file).write_text("{}")
    write_manifest(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, name: manifest["position.json"]}))
    with pytest.raises(CheckpointError):
        verify_checkpoint(folder)


def test_ids_are_data(tmp_path, write_rows):
    odd = ["../../etc/passwd", "a/b", "a\nb", "\x1b[2J", "<script>", "", " "]
    rows = [{"id": one, "instruction": "x", "output": "y"} for one in odd if one.strip()]
    assert [example.id for example in load_examples(write_rows(rows), need_output=True)] == odd[:5]
    with pytest.raises(InputError) as caught:
        load_examples(write_rows([rows[3], rows[3]]), need_output=True)
    assert str(caught.value).isprintable(), "a terminal is told, not commanded"


def test_pages_show_what_data_say():
    odd = "<script>alert(1)</script>"
    shown = html.facts({odd: odd}) + html.text(odd) + html.page(odd, [])
    assert "<script>alert" not in shown


def test_a_safetensors_file_says_no_more_than_tensors(tmp_path):
    """Its header is JSON of names, types and shapes; one that reaches behind the file's end is refused."""
    path = tmp_path / "a.safetensors"
    save_file({}, path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(Exception, match=r"[Ii]nvalid|[Mm]etadata|header|small"):
        load_file(path)
