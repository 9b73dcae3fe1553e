"""The rules of the house, checked by reading the code: who imports whom, and what loads only when needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "qlora": set(),
    "tuning": {"qlora"},
    "inference": {"qlora"},
    "tracking": {"qlora"},
    "ray_jobs": {"qlora", "tuning", "inference", "tracking"},
}
OWNER = {"ray.tune": "tuning", "ray.data": "inference", "mlflow": "tracking"}
HEAVY = ("torch", "ray", "mlflow", "transformers", "peft")


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


def test_every_room_has_files():
    assert all(len(files_of(room)) > 1 for room in MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    for path in files_of(room):
        rooms = {name.partition(".")[0] for name in imports_of(path)} & set(MAY_IMPORT)
        assert rooms <= MAY_IMPORT[room] | {room}, path


@pytest.mark.parametrize(("package", "owner"), OWNER.items())
def test_a_library_has_one_room(package, owner):
    users = {
        room
        for room in MAY_IMPORT
        for path in files_of(room)
        for name in imports_of(path)
        if name == package or name.startswith(package + ".")
    }
    assert users == {owner}


def test_the_core_knows_no_ray():
    assert not any(name.partition(".")[0] == "ray" for path in files_of("qlora") for name in imports_of(path))


def loaded_by(code: str) -> str:
    report = f"import sys; {code}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout


def test_settings_import_nothing_heavy():
    assert loaded_by("import qlora.config, ray_jobs.cli").strip() == "[]"


def test_a_sweep_starts_hosts_before_it_loads_anything_heavy_but_ray():
    assert loaded_by("import workflows.sweep.folder, workflows.sweep.start").strip() == "['ray']"


def test_a_driver_of_sweeps_starts_without_peft():
    assert "peft" not in loaded_by("import tuning.sweep, workflows.sweep.run")


@pytest.mark.parametrize("command", ["tune", "evaluate", "batch_infer", "promote", "study"])
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
