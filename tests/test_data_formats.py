"""Data as people have it: every format and shape gives the same examples to every command."""

import csv
import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import object_store
from test_inputs import evaluate, infer, nothing_heavy_happens, refused  # noqa: F401

from inference.predictions import Journal, write_predictions
from inference.rows import store_rows
from qlora.config import InputError
from qlora.data import sources
from qlora.data.examples import found_shape, load_examples
from qlora.data.prompts import prompt_file
from qlora.data.row_shapes import instruction_example
from tuning.space import DataSettings

ROWS = [
    {"id": "007", "instruction": '問，"甲"\n第二行', "output": "答\t一"},
    {"id": "b", "instruction": "問；乙 👩‍👧 {instruction}", "output": "二"},
    {"id": "c", "instruction": "\u2028 a\u0085b", "output": "=三"},
]
EXAMPLES = [instruction_example(*row.values()) for row in ROWS]


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def as_arrow(rows: list[dict[str, Any]], new: Callable) -> bytes:
    file, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return file.getvalue()


FORMATS = {
    "list.json": lambda rows: json.dumps(rows).encode(),
    "list_named.jsonl": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "lines.jsonl": lambda rows: b"\n".join(json.dumps(row, ensure_ascii=False).encode() for row in rows),
    "LINES_NAMED.JSON": lambda rows: b"\n\n".join(json.dumps(row).encode() for row in rows) + b"\n",
    "windows.txt": lambda rows: b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows),
    "table.csv": as_csv,
    "table.TSV": lambda rows: as_csv(rows, "\t"),
    "semicolons": lambda rows: b"\xef\xbb\xbf" + as_csv(rows, ";"),
    "table.parquet": as_parquet,
    "parquet_without_a_suffix": as_parquet,
    "file.arrow": lambda rows: as_arrow(rows, pa.ipc.new_file),
    "stream.arrow": lambda rows: as_arrow(rows, pa.ipc.new_stream),
}


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_examples(name, is_packed, tmp_path):
    content = FORMATS[name](ROWS)
    path = tmp_path / (f"{name}.gz" if is_packed else name)
    path.write_bytes(gzip.compress(content) if is_packed else content)
    assert load_examples(path, need_output=True) == EXAMPLES
    assert found_shape(path).words == "instruction + output"


def test_several_files_are_one_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.json").write_bytes(FORMATS["list.json"](ROWS[:1]))
    (tmp_path / "b.csv").write_bytes(as_csv(ROWS[1:]))
    both = ["~/a.json", f"file://{tmp_path}/b.csv"]
    assert load_examples(both, need_output=True) == EXAMPLES
    assert DataSettings(train=both, public="~/a.json").train == (str(tmp_path / "a.json"), both[1])
    with pytest.raises(InputError, match=r"b.csv:row 0: id 'b' was used in row 1;"):
        load_examples([*both, str(tmp_path / "b.csv")], need_output=True)
    with pytest.raises(InputError, match=r"; that is file://.*/b.csv:row 0$"):
        load_examples([*both, str(tmp_path / "b.csv")], need_output=True)


def test_an_id_that_is_another_rows_number(write_rows):
    rows = [{"id": 1, "instruction": "甲", "output": "乙"}, {"instruction": "甲", "output": "乙"}]
    with pytest.raises(InputError, match=r"row 1: id 1 was used in row 0; .*; a row without an id has its"):
        load_examples(write_rows(rows), need_output=True)


def test_other_stores_are_read_by_their_address(tmp_path):
    import fsspec

    with fsspec.open("memory://bucket/rows.json.gz", "wb") as file:
        file.write(gzip.compress(FORMATS["list.json"](ROWS)))
    assert load_examples("memory://bucket/rows.json.gz", need_output=True) == EXAMPLES


@pytest.mark.slow
def test_a_bucket_is_read(monkeypatch):
    boto3 = pytest.importorskip("boto3", reason="pip install '.[servers]'")
    with object_store("data") as keys:
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").put_object(Bucket="data", Key="a/rows.csv", Body=as_csv(ROWS))
        assert load_examples("s3://data/a/rows.csv", need_output=True) == EXAMPLES
        with pytest.raises(InputError, match=r"s3://data/a/none\.csv: "):
            load_examples("s3://data/a/none.csv", need_output=True)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a dataset of one file takes."""

    revision = "1" * 40
    files: ClassVar = {"README.md": b"---\n---\n", "train.jsonl": FORMATS["lines.jsonl"](ROWS)}

    def do_GET(self):
        path, body, headers = self.path.partition("?")[0], None, {}
        name = path.rpartition("/")[2]
        if path == f"/datasets/us/course/resolve/v1/{name}" or f"/resolve/{self.revision}/" in path:
            body, headers = self.files.get(name), {"X-Repo-Commit": self.revision, "ETag": f'"{name}"'}
        elif path.startswith("/api/datasets/us/course/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "us/course", "sha": self.revision, "siblings": siblings}).encode()
        elif path == f"/api/datasets/us/course/tree/{self.revision}":
            files = [{"type": "file", "path": name, "size": len(self.files[name])} for name in self.files]
            body = json.dumps([{**file, "oid": self.revision} for file in files]).encode()
        self.send_response(404 if body is None else 200)
        headers["Content-Length"] = str(len(body or b""))
        for key, value in headers.items():
            self.send_header(key, value)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_a_split_of_the_hub_is_read(tmp_path):
    pytest.importorskip("datasets", reason="pip install '.[datasets]'")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys; from qlora.config import InputError; from qlora.data.examples import load_examples\n"
        "try: print([[one.id, one.instruction, one.output] for one in load_examples(sys.argv[1], "
        "need_output=True)])\n"
        "except InputError as error: print(error)"
    )

    def read(place: str) -> str:
        address = f"http://127.0.0.1:{server.server_port}"
        home = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", code, place]
        environment = {**os.environ, **home}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    try:
        assert read("hf://datasets/us/course@v1/train") == f"{[list(row.values()) for row in ROWS]}\n"
        missing = read("hf://datasets/us/course@v1/valid")
        assert missing.startswith("hf://datasets/us/course@v1/valid: can't be had from the hub: ")
        assert "Unknown split" in missing and missing.count("\n") == 1
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("memory://nowhere/rows.json", "no such file"),
        ("warp://bucket/rows.json", "Protocol not known"),
        ("ftp://me:canary@127.0.0.1:9/rows.json", "holds a password"),
        ("hf://datasets/OWNER/NAME@main/train", "pip install"),
    ],
)
def test_an_address_that_gives_nothing(place, problem, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=problem) as error:
        load_examples(place, need_output=True)
    assert "canary" not in str(error.value)


DAMAGED = {
    "cut.parquet": (as_parquet(ROWS)[:-9], "is a damaged Parquet file"),
    "cut.arrow": (as_arrow(ROWS, pa.ipc.new_stream)[:40], "is a damaged Arrow file"),
    "cut.json.gz": (gzip.compress(FORMATS["list.json"](ROWS))[:-20], "is a damaged gzip file"),
    "noise.gz": (b"\x1f\x8b noise and more noise", "is a damaged gzip file"),
    "short.csv": (b"instruction,output\na,b\nc\n", "line 3: has 1 fields, and the header 2"),
    "long.csv": (b"instruction,output\na,b,c\n", "line 2: has 3 fields, and the header 2"),
    "open.csv": (b'instruction,output\na,"b\n', "is not valid CSV: unexpected end of data"),
    "twice.csv": (b"instruction,output,output\na,b,c\n", "has more than one column 'output'"),
    "utf16.csv": ("id,instruction\na,b\n".encode("utf-16"), "is not UTF-8"),
    "header.csv": (b"id,instruction\n", "holds no rows"),
    "prose.txt": (b"Once upon a time, there was a file.\nIt had, alas no columns.\n", "is of no known shape"),
    "numbers.parquet": (as_parquet([{"instruction": 3}]), "instruction must be text, not a number"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_data_are_one_line(name, evaluate, infer, tmp_path):  # noqa: F811
    content, problem = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    for run in (evaluate, infer):
        error = run(tmp_path / name)
        assert problem in error and name in error


@pytest.mark.parametrize("number", [0, 17, -3, 2**70, 1.5])
def test_ids_are_written_as_they_came(number, write_rows, tmp_path):
    source = write_rows([{"id": number, "instruction": "甲"}, {"id": "x", "instruction": "乙"}])
    written = [{"id": number, "output": "一"}, {"id": "x", "output": "二"}]
    assert json.loads(predicted(source, tmp_path / "out.json").read_text()) == written
    lines = predicted(source, tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == written
    table = pq.read_table(predicted(source, tmp_path / "out.Parquet")).to_pylist()
    assert table == [{**written[0], "id": str(number)}, written[1]]


def test_a_table_keeps_numbers_as_ids(write_rows, tmp_path):
    source = write_rows([{"instruction": "甲"}, {"instruction": "乙"}])
    table = pq.read_table(predicted(source, tmp_path / "out.parquet"))
    assert table.schema.field("id").type == pa.int64()
    assert table.to_pylist() == [{"id": 0, "output": "一"}, {"id": 1, "output": "二"}]
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.parquet"], "no unfinished file is left"


def predicted(source: Path, output: Path) -> Path:
    """Write the outputs of two rows."""
    folder = output.with_name("work-" + output.name)
    rows = store_rows(source, folder)
    journal = Journal(folder, {}, 2, resume=False)
    journal.append([(0, "一", None), (1, "二", None)])
    assert write_predictions(output, rows, journal) == []
    journal.close()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return output


def test_the_output_is_not_the_input(infer, evaluate, write_rows, tmp_path):  # noqa: F811
    data = write_rows([{"instruction": "甲", "output": "乙"}])
    for run in (infer, evaluate):
        assert "is the input too" in run(data, "--output", data)
    assert json.loads(data.read_text()) == [{"instruction": "甲", "output": "乙"}]


@pytest.mark.parametrize("option", ["implied", "named"])
def test_the_output_is_no_prompt_that_is_named(option, infer, evaluate, write_rows):  # noqa: F811
    data = write_rows([{"instruction": "甲", "output": "乙"}])
    for run in (infer, evaluate):
        for name, options in (("default", ()), ("few-shot", ("--shots", "1", "--shots-from", data))):
            read = prompt_file(name)
            before = read.read_bytes()
            asked = () if option == "implied" else ("--prompt", name)
            assert "is the input too" in run(data, *options, *asked, "--output", read)
            assert read.read_bytes() == before
        assert "File name too long" in run(data, "--prompt", "x" * 300)


@pytest.mark.parametrize("option", ["--shots-from", "--prompt"])
def test_the_output_is_no_file_that_is_read(option, infer, evaluate, write_rows, tmp_path):  # noqa: F811
    data, shots = (write_rows([{"instruction": "甲", "output": "乙"}], name) for name in ("a.json", "b.json"))
    (tmp_path / "prompt.yaml").write_text('template: "{instruction}"', encoding="utf-8")
    read = shots if option == "--shots-from" else tmp_path / "prompt.yaml"
    before = read.read_bytes()
    for run in (infer, evaluate):
        for output in (read, tmp_path / "x" / ".." / read.name):
            shown = ("--shots", "1") if option == "--shots-from" else ()
            assert "is the input too" in run(data, *shown, option, read, "--output", output)
    assert read.read_bytes() == before


@pytest.mark.parametrize(
    "content", ['[{"id": 1, "text": "a", "text": "b"}]', '{"text": "a"}\n{"text": "a", "text": "b"}']
)
def test_a_key_that_stands_twice(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"line \d: holds the key 'text' twice"):
        load_examples(tmp_path / "x.json", need_output=True)


NO_DATA = {
    "nothing": (b"", "is empty"),
    "a byte-order mark": (b"\xef\xbb\xbf", "is empty"),
    "nothing under gzip": (gzip.compress(b""), "is empty"),
    "an empty zip": (b"PK\x05\x06" + bytes(18), "is a zip archive"),
    "something packed": (b"\xfd7zXZ\0", "is packed; unpack it, or pack it by gzip"),
    "a zip": (b"PK\x03\x04\x14\x00", "is a zip archive; unpack it"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
}


@pytest.mark.parametrize("case", NO_DATA)
def test_files_that_hold_no_data_say_what_they_are(case, tmp_path):
    content, words = NO_DATA[case]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_examples(tmp_path / "x", need_output=True)


def test_one_object_of_several_lines_with_a_key_twice(tmp_path):
    (tmp_path / "x.json").write_text('{\n "text": "a",\n "text": "b"\n}')
    with pytest.raises(InputError, match="not an object of several lines"):
        load_examples(tmp_path / "x.json", need_output=True)


def test_a_pipe_is_read_as_often_as_a_file():
    end, start = os.pipe()
    os.write(start, FORMATS["lines.jsonl"](ROWS))
    os.close(start)
    place = f"/dev/fd/{end}"
    assert load_examples(place, need_output=True) == EXAMPLES
    assert found_shape(place).words == "instruction + output"
    assert load_examples(place, need_output=True) == EXAMPLES
    os.close(end)
