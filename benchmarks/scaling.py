"""Batch inference by one worker against several: whole commands on the same rows, Ray, model loading and all.

    python benchmarks/scaling.py [--workers 2] [--data FILE] [--rows 64] [--base-model BASE] [--new-tokens 32]

`ours` and `baseline` are rows a second while engines generate; `settings` has the same with start-up counted. On a machine
without a GPU one worker has all cores and several share them, so the ratio is near 1.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.report import print_report
from qlora.config import DEFAULT_BASE
from qlora.data import load_examples

_ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data", default="data/sample/private_test.json")
    parser.add_argument("--rows", type=int, default=64, help="rows of the data, over and over")
    parser.add_argument("--base-model", default=DEFAULT_BASE)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--num-beams", type=int, default=3)
    arguments = parser.parse_args()
    data = load_examples(arguments.data, need_output=False)
    rows = [{"id": str(n), "instruction": data[n % len(data)].instruction} for n in range(arguments.rows)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        found = {workers: measure(arguments, Path(folder), workers) for workers in (1, arguments.workers)}
    one, several = found[1], found[arguments.workers]
    print_report("scaling", several["rows_per_second_generating"], one["rows_per_second_generating"], "rows/s",
                 {**vars(arguments), "workers_found": found,
                  "ratio_with_start_up": round(several["rows_per_second"] / one["rows_per_second"], 2)}, higher_is_better=True)


def measure(arguments: argparse.Namespace, folder: Path, workers: int) -> dict[str, Any]:
    """Run the command and read what it says of itself."""
    output = folder / f"{workers}.json"
    command = [sys.executable, "ray_jobs/batch_infer.py", "--base-model", arguments.base_model, "--quantization", arguments.quantization,
               "--input", str(folder / "rows.json"), "--output", str(output), "--workers", str(workers),
               "--num-beams", str(arguments.num_beams), "--max-new-tokens", str(arguments.new_tokens),
               "--min-new-tokens", str(arguments.new_tokens)]
    subprocess.run(command, cwd=_ROOT, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    meta = json.loads(output.with_name(f"{workers}.json.meta.json").read_text(encoding="utf-8"))
    return {key: meta[key] for key in ("seconds", "seconds_generating", "rows_per_second", "rows_per_second_generating")}


if __name__ == "__main__":
    main()
