"""The rules of the house, checked by reading the code: who imports whom, what loads only when needed, how it
reads.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOWER = {"qlora", "tuning", "inference", "tracking", "reporting"}
MAY_IMPORT = {
    "qlora": set(),
    "tuning": {"qlora"},
    "inference": {"qlora"},
    "tracking": {"qlora"},
    "reporting": {"qlora"},
    "workflows": LOWER,
    "ray_jobs": LOWER | {"workflows"},
    "deploy": {"qlora", "inference"},
    "examples": {"qlora"},
    "benchmarks": LOWER | {"workflows"},
    "docs": {"tracking", "workflows"},
}
OWNER = {
    "ray.tune": {"tuning", "benchmarks"},  # where it is the baseline
    "ray.data": {"inference", "benchmarks"},
    "mlflow": {"tracking", "deploy", "docs"},
}
HEAVY = ("torch", "ray", "mlflow", "transformers", "peft")
COMMANDS = ["tune", "evaluate", "batch_infer", "promote", "study", "export", "fetch"]
# What a class may be a case of: interfaces, data, errors, and what libraries ask to be derived from.
BASES = {
    "Protocol",
    "Settings",
    "BaseModel",
    "TypedDict",
    "Exception",
    "ValueError",
    "RuntimeError",
    "nn.Module",
    "torch.autograd.Function",
    "tune.Callback",
    "Stopper",
    "TrialScheduler",
    "SearchAlgorithm",
    "PythonModel",
    "argparse.ArgumentParser",
    "yaml.SafeLoader",
    "Searcher",
}


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, `from a import b` counting as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


ALL_FILES = [path for room in MAY_IMPORT for path in files_of(room)]


def definitions(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a file that others may use, with the methods of such classes."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append(node)
            found += [
                child
                for child in getattr(node, "body", [])
                if isinstance(node, ast.ClassDef)
                and isinstance(child, ast.FunctionDef)
                and not child.name.startswith("_")
            ]
    return found


def test_every_room_has_files():
    assert all(files_of(room) for room in MAY_IMPORT)
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert {room for room in there if not room.startswith(".")} - {
        "tests",
        "build",
        "mlruns",
        "results",
    } == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    for path in files_of(room):
        rooms = {name.partition(".")[0] for name in imports_of(path)} & set(MAY_IMPORT)
        assert rooms <= MAY_IMPORT[room] | {room}, path


@pytest.mark.parametrize(("package", "owners"), OWNER.items())
def test_a_library_has_one_room(package, owners):
    users = {
        room
        for room in MAY_IMPORT
        for path in files_of(room)
        for name in imports_of(path)
        if name == package or name.startswith(package + ".")
    }
    assert users <= owners
    assert users


def test_the_core_knows_no_ray():
    assert not any(name.partition(".")[0] == "ray" for path in files_of("qlora") for name in imports_of(path))


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_owns_and_stays_small(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"
    assert text.count("\n") <= 345, "a module owns one thing"


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_sentences_that_begin_with_a_verb(path):
    """Plain English for functions: what one does, never "Of ..." or "Those of ..."."""
    for node in definitions(path):
        words = ast.get_docstring(node)
        assert words, f"{node.name} has no docstring"
        first = re.match(r"[\w'-]+", words)
        assert first, f"{node.name}: {words[:40]!r}"
        assert first[0] not in ("Of", "Those", "What", "Whether", "Where", "Which", "There"), node.name
        if isinstance(node, ast.FunctionDef):
            assert first[0] not in ("The", "A", "An", "All", "One", "As", "This", "Its"), (
                f"{node.name}: {words[:60]!r}"
            )


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_class_inherits_implementation(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert {ast.unparse(base) for base in node.bases} <= BASES, node.name


def loaded_by(code: str) -> str:
    told = f"print([name for name in {HEAVY!r} if name in sys.modules])"
    report = f"import atexit, sys; atexit.register(lambda: {told}); {code}"  # a command leaves its process
    return subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_settings_import_nothing_heavy():
    assert loaded_by("import qlora.config, ray_jobs.cli, workflows.session").strip() == "[]"


def test_a_sweep_starts_hosts_before_it_loads_anything_heavy_but_ray():
    code = "import workflows.sweep.folder, workflows.sweep.prepared, workflows.sweep.start"
    assert loaded_by(code).strip() == "['ray']"


def test_a_finished_sweep_is_told_of_without_heavy_libraries():
    assert loaded_by("import workflows.sweep.folder, workflows.sweep.closing").strip() == "[]"


def test_a_driver_of_sweeps_starts_without_peft():
    assert "peft" not in loaded_by("import tuning.sweep, workflows.sweep.run")


def test_a_base_in_nf4_loads_without_torchs_compiler(tiny_base):
    """No file of it: on a fresh machine they are read from a cold disk. Who wants it later has it."""
    code = f"""
import os, sys, torch
from qlora.base.model import load_base
from qlora.config import BaseModelSettings
model = load_base(BaseModelSettings(name={str(tiny_base)!r}))
print([name for name in sys.modules if name.startswith("torch._inductor.compile_fx")])
compiled = []
twice = torch.compile(lambda x: 2 * x, backend=lambda graph, inputs: compiled.append(1) or graph)
print(twice(torch.ones(2)).tolist(), len(compiled), "TORCHDYNAMO_DISABLE" in os.environ)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-2:] == ["[]", "[2.0, 2.0] 1 False"]


@pytest.mark.ray
def test_what_trials_are_handed_loads_nothing_heavy():
    """Else each of their processes would load what hosts need, all at once, while devices wait for them."""
    code = f"""
import sys, ray
from tuning.host_directory import begin_hosts, start_hosts
from workflows.cluster.nodes import Needs, joining
from workflows.session import connect_ray
connect_ray()
hosts = start_hosts()
begin_hosts(hosts, "data", joining(Needs("base"), []))
loaded = ray.remote(num_cpus=0)(lambda hosts: [name for name in {HEAVY!r} if name in sys.modules])
print(ray.get(loaded.remote(hosts)))"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "['ray']"


def test_processes_that_hand_out_rows_load_no_model_libraries():
    loaded = loaded_by("import inference.rows, inference.attempts")
    assert "torch" not in loaded and "transformers" not in loaded


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_and_loads_nothing_heavy(command):
    code = f"""
import runpy
sys.argv = ["{command}.py", "--help"]
try:
    runpy.run_path("ray_jobs/{command}.py", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code"""
    out = loaded_by(code)
    assert out.startswith("usage:")
    assert out.strip().endswith("[]")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_explains_itself(command):
    out = subprocess.run(
        [sys.executable, f"ray_jobs/{command}.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    options = re.split(r"\n  (?=-)", out.partition("options:")[2])[1:]
    assert options
    for option in options:
        assert len(option.split()) > 4, option


def test_the_table_of_behaviours_names_files_that_exist():
    """Each row of docs/modules.md: behaviour, modules, tests (or a dash)."""
    rows = [
        line.strip("|").split("|")
        for line in (ROOT / "docs/modules.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|") and "`" in line
    ]
    named = [re.findall(r"`([^`]+)`", cell) for row in rows for cell in row[1:]]
    files = {file for cell in named for file in cell}
    assert all(len(row) == 3 and re.findall(r"`[^`]+`", row[1]) for row in rows)
    assert not [file for file in sorted(files) if not (ROOT / file).is_file()]


@pytest.mark.parametrize("path", ALL_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_stands_in_the_table_of_behaviours(path):
    table = (ROOT / "docs/modules.md").read_text(encoding="utf-8")
    assert path.name == "__init__.py" or f"`{path.relative_to(ROOT)}`" in table
