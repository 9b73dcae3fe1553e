"""The scaling benchmark on Ray nodes of this machine's cores, which stand for GPUs: both of its jobs, spread
over two.
"""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(
    ("job", "options"),
    [
        ("sweep", ["--devices", "2", "--train-examples", "16", "--trials-per-device", "2", "--lora-r", "4"]),
        ("infer", ["--devices", "1", "2", "--rows-per-device", "8", "--new-tokens", "4"]),
    ],
)
def test_one_line_for_each_number_of_devices(job, options, tiny_base):
    base = ["--base-model", str(tiny_base), "--quantization", "none"]
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", job, *options, *base],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    numbers = [
        int(word)
        for word in options[1 : options.index("--train-examples" if job == "sweep" else "--rows-per-device")]
    ]
    assert [report["settings"]["devices"] for report in reports] == numbers
    for report, devices in zip(reports, numbers, strict=True):
        settings = report["settings"]
        assert report["ours"] > 0 and report["baseline"] == reports[0]["ours"]
        assert settings["efficiency"] == pytest.approx(
            report["ours"] / report["baseline"] * numbers[0] / devices, abs=0.01
        )
        assert (
            0 < settings["start_up_seconds"] < settings["seconds"]
            and 0 < settings["driver_cpu_seconds"] < settings["seconds"] * 2
        )
        assert settings["rows" if job == "infer" else "trials"] == {"infer": 8, "sweep": 2}[job] * devices
