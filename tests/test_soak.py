"""What `make soak` calls growth, and one short watch over a real job."""

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import soak

STEADY = soak.Sample(
    seconds=0.0,
    done=0,
    processes=12,
    memory_mb=1500.0,
    driver_memory_mb=300.0,
    handles=2000,
    driver_handles=90,
    temporary_files=3,
    temporary_mb=0.1,
    disk_mb=1.0,
)


def course(**by_step: float) -> list[soak.Sample]:
    """A hundred samples, each of which adds so much to what is steady."""
    changes = [{key: getattr(STEADY, key) + step * n for key, step in by_step.items()} for n in range(100)]
    return [replace(STEADY, done=n + 1, **change) for n, change in enumerate(changes)]


def test_what_is_steady_does_not_grow():
    assert soak.growth_of(soak.parts_of(course())) == {}
    assert soak.growth_of(soak.parts_of(course(disk_mb=5.0))) == {}  # results are to be kept


@pytest.mark.parametrize(
    ("key", "step"),
    [("processes", 0.2), ("memory_mb", 8.0), ("handles", 10), ("driver_handles", 1), ("temporary_files", 1)],
)
def test_what_leaks_is_told(key, step):
    assert set(soak.growth_of(soak.parts_of(course(**{key: step})))) == {key}


@pytest.mark.slow
@pytest.mark.ray
def test_a_short_job_is_watched():
    with tempfile.TemporaryDirectory(prefix="soak") as folder:  # Ray's sockets need a short path
        project = soak.make_project(Path(folder), 600)
        samples = soak.watch(project, soak.batch_command(), soak.rows_done, 0.5)
    assert max(sample.processes for sample in samples) > 3
    assert all(sample.memory_mb > 0 and sample.driver_handles > 0 for sample in samples)
