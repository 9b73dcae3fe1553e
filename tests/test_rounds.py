"""Early stopping in rounds: who goes on, when the next round begins, what a sweep decides that goes on."""

import math
import time
from types import SimpleNamespace

import pytest
from conftest import command, finished
from ray.tune.experiment import Trial
from test_faults import family
from test_sweep import ledger, wait_for_a_report

from qlora.training import Timetable
from tuning.clone_seats import CloneSeats
from tuning.evaluation_steps import evaluation_steps
from tuning.ledger import TrialRecord
from tuning.round_scheduler import RoundScheduler
from tuning.space import load_space
from tuning.strategy import NoEarlyStopping, Rounds

ROUNDS = Rounds(type="rounds", trials=4, kept=1, steps=12)
SWEEP = (
    "--space", "space.yaml", "--set", "num_samples=6",
    "--set", "scheduler={type: rounds, trials: 3, kept: 1, steps: 2}",
    "--set", "searcher={type: prior}", "--set", "search.epochs={choice: [6]}",
    "--set", "search.learning_rate={loguniform: [1.0e-4, 3.0e-2]}",
)  # fmt: skip


class RaysTrial:
    """Stands in for a trial of Ray's, as the scheduler sees it."""

    def __init__(self, number: int):
        self.trial_id, self.status = f"7_{number:05d}", Trial.PENDING

    def is_finished(self) -> bool:
        return self.status in (Trial.TERMINATED, Trial.ERROR)

    def init_local_path(self) -> None:
        pass

    def set_status(self, status: str) -> None:
        self.status = status


class Played:
    """Ray's controller, as a scheduler sees it, with room for one trial at a time."""

    def __init__(self, perplexities: list[float], records=(), num_devices: int = 1, total_steps: int = 100):
        self.perplexities, self.total_steps = perplexities, total_steps
        self.scheduler = RoundScheduler(ROUNDS, records, len(perplexities), num_devices)
        self.trials, self.went_on = [], []

    def _set_trial_status(self, trial: RaysTrial, status: str) -> None:
        trial.status = status

    def get_trials(self) -> list[RaysTrial]:
        return self.trials

    def stop_trial(self, trial: RaysTrial) -> None:
        assert trial.status == Trial.PAUSED
        trial.status = Trial.TERMINATED

    def begin(self) -> None:
        """Add all trials that may begin."""
        while len(self.trials) < len(self.perplexities) and self.scheduler.may_begin(len(self.trials)):
            self.add(RaysTrial(len(self.trials)))

    def add(self, trial: RaysTrial) -> None:
        self.trials.append(trial)
        self.scheduler.on_trial_add(self, trial)

    def report(self, trial: RaysTrial, step: int) -> str:
        value = self.perplexities[int(trial.trial_id[2:])]
        percent = 100 * step / self.total_steps
        return self.scheduler.on_trial_result(
            self, trial, {"public_perplexity": value, "step": step, "schedule_percent": percent}
        )

    def turn(self) -> bool:
        """Let the chosen trial run to where it is paused, or ends; tell whether there was one."""
        trial = self.scheduler.choose_trial_to_run(self)
        if trial is None:
            return False
        if trial.status == Trial.PAUSED:
            self.went_on.append(trial.trial_id)
        decision = self.report(trial, 12) if trial.status == Trial.PENDING else "CONTINUE"
        trial.status = Trial.PAUSED if decision == "PAUSE" else Trial.TERMINATED
        return True

    def play(self) -> list[int]:
        """Run the sweep to its end; returns the numbers of the trials that went on."""
        while True:
            self.begin()
            if not self.turn():
                break
        assert all(trial.is_finished() for trial in self.trials)
        return [int(trial_id[2:]) for trial_id in self.went_on]


def test_the_best_of_each_round_goes_on_and_a_short_last_round_is_one():
    assert Played([9, 7, 8, 6, 3, 2, 4, 5, 8, 7]).play() == [3, 5, 9]


def test_a_round_begins_when_those_before_are_over_or_a_device_has_none():
    for num_devices in (1, 2):
        sweep = Played([9, 7, 8, 6, 3, 2, 4, 5, 8, 7], num_devices=num_devices)
        sweep.begin()
        assert len(sweep.trials) == 4 * num_devices
        for _ in range(4):
            sweep.turn()
        sweep.begin()
        assert len(sweep.trials) == 4 * num_devices  # one of the first round goes on
        while sweep.went_on != ["7_00003"]:
            sweep.turn()
        sweep.begin()
        assert len(sweep.trials) == min(10, 4 * (num_devices + 1))


def test_a_trial_that_diverges_or_fails_keeps_nobody_waiting():
    sweep = Played([9, math.inf, 8, 6])
    sweep.begin()
    sweep.trials[2].status = Trial.ERROR
    while sweep.turn():
        pass
    assert sweep.went_on == ["7_00003"]
    assert Played([math.inf] * 4).play() == []


def test_a_trial_that_failed_after_it_was_compared_is_decided_on_all_the_same():
    """Ray adds it again, as pending: a loser must not train on, and one that goes on does."""
    sweep = Played([9, 7, 8, 6])
    sweep.begin()
    for _ in range(3):
        sweep.turn()
    loser = sweep.trials[0]
    loser.status = Trial.PENDING
    sweep.scheduler.on_trial_add(sweep, loser)
    assert loser.status == Trial.PAUSED
    sweep.turn()
    best = sweep.scheduler.choose_trial_to_run(sweep)
    assert (best.trial_id, loser.status) == ("7_00003", Trial.TERMINATED)
    best.status = Trial.PENDING
    sweep.scheduler.on_trial_add(sweep, best)
    assert sweep.scheduler.choose_trial_to_run(sweep) is best


def test_trials_that_end_before_the_comparison_are_compared_by_their_ends():
    assert Played([9, 7, 8, 6], total_steps=12).play() == []  # whole already; nobody is paused
    mixed = Played([5, 7, 8, 6])
    mixed.begin()
    short = mixed.trials[0]
    point = {"public_perplexity": 5, "step": 8, "schedule_percent": 100.0}
    assert mixed.scheduler.on_trial_result(mixed, short, point) == "CONTINUE"
    short.status = Trial.TERMINATED
    assert mixed.play() == []  # it is the best of its round, and the others are stopped


def test_what_was_decided_is_decided_again_after_a_stop():
    """In a sweep that stopped in its second round: a loser is not told yet, a trial is yet to come."""
    values = [9, 7, 8, 6, 3, 2, 4, 5]

    def told(number: int, status: str, *steps: int) -> TrialRecord:
        curve = tuple(
            {"step": step, "schedule_percent": step, "public_perplexity": values[number]} for step in steps
        )
        return TrialRecord(f"7_{number:05d}", {}, status, curve)

    first = [
        told(0, "stopped", 12),
        told(1, "pending", 12),
        told(2, "stopped", 12),
        told(3, "running", 12, 50),
    ]
    sweep = Played(values, [*first, told(4, "pending", 12), told(5, "pending", 12), told(6, "stopped", 12)])
    for number in (1, 3, 4, 5, 7):
        assert sweep.scheduler.may_begin(number) or number == 4
        sweep.add(RaysTrial(number))
    assert [trial.status for trial in sweep.trials] == [Trial.PAUSED] * 4 + [Trial.PENDING]
    while sweep.turn():
        pass
    assert sweep.went_on == ["7_00003", "7_00005"]


def test_trials_that_are_added_make_rounds_of_their_own():
    """What was decided before stands: a short last round does not wait for those that came later."""
    values = [9, 7, 8, 6, 3, 2, 4, 5, 1]
    draws = []
    sweep = Played(values[:6])
    sweep.scheduler = RoundScheduler(ROUNDS, [], 6, 1, draws)
    assert sweep.play() == [3, 5]
    draws.extend([2, 1])
    sweep.perplexities = values
    assert sweep.play() == [3, 5, 6, 8]
    again = Played(values)
    again.scheduler = RoundScheduler(ROUNDS, [], 6, 1, draws)
    assert again.play() == [3, 5, 6, 8]


def test_a_clone_is_in_no_round_and_leaves_those_of_the_others_as_they_were():
    """Behind the second trial and behind the last one; a sweep that goes on knows them from their records."""
    sweep = Played([9, 7, 8, 6])
    clones = {"7_00002": None, "7_00005": None}
    search = SimpleNamespace(sources=clones, upcoming_clone=None)
    sweep.scheduler.clones = CloneSeats(search, [], print, print)
    sweep.perplexities = [9, 7, 1, 8, 6, 2]
    for number in range(6):
        if number not in (2, 5):
            assert sweep.scheduler.may_begin(number)
        sweep.add(RaysTrial(number))
    assert not sweep.scheduler.may_begin(6)
    for trial in sweep.trials:
        decision = sweep.report(trial, 12)
        assert decision == ("CONTINUE" if trial.trial_id in clones else "PAUSE")
        trial.status = Trial.RUNNING if trial.trial_id in clones else Trial.PAUSED
    assert sweep.scheduler.choose_trial_to_run(sweep).trial_id == "7_00004"
    point = {"step": 12, "schedule_percent": 12.0, "public_perplexity": 9.0}
    values = enumerate([9, 7, 1, 8, 6, 2])
    records = [
        TrialRecord(
            f"7_{number:05d}", {}, "pending", ({**point, "public_perplexity": value},),
            cloned_from="7_00000" if number in (2, 5) else None,
        )
        for number, value in values
    ]  # fmt: skip
    again = Played([9, 7, 8, 6], records)
    for number in range(6):
        again.add(RaysTrial(number))
    waiting = [trial.status for trial in again.trials]
    assert waiting == [Trial.PAUSED, Trial.PAUSED, Trial.PENDING, Trial.PAUSED, Trial.PAUSED, Trial.PENDING]
    assert again.scheduler.choose_trial_to_run(again).trial_id == "7_00004"


def test_a_trial_that_was_set_aside_for_a_clone_comes_back_to_its_round():
    sweep = Played([9, 7, 8, 6])
    sweep._reuse_actors = False
    sweep.pause_trial = lambda trial, should_checkpoint: trial.set_status(Trial.PAUSED)
    search = SimpleNamespace(sources={}, upcoming_clone=None)
    sweep.scheduler.clones = CloneSeats(search, [], print, print)
    sweep.begin()
    aside = sweep.trials[1]
    for trial in sweep.trials:
        trial.status = Trial.PAUSED
        assert (
            sweep.scheduler.on_trial_result(sweep, trial, {"public_perplexity": math.inf, "set_aside": False})
            == "NOOP"
            if trial is aside
            else sweep.report(trial, 12) == "PAUSE"
        )
    assert sweep.scheduler.choose_trial_to_run(sweep) is aside
    aside.status = Trial.RUNNING
    assert sweep.scheduler.choose_trial_to_run(sweep) is None, "its round waits for it"
    assert sweep.report(aside, 12) == "PAUSE"
    aside.status = Trial.PAUSED
    assert sweep.scheduler.choose_trial_to_run(sweep).trial_id == "7_00003"
    assert aside.status == Trial.TERMINATED


def test_trials_are_evaluated_where_they_are_compared():
    timetable = Timetable(40, (1, 1))
    steps = evaluation_steps(timetable, NoEarlyStopping(type="fifo"), 1)
    assert evaluation_steps(timetable, ROUNDS, 1) == {12, *steps} == {12, 40, 80}
    assert evaluation_steps(Timetable(5, (1,)), ROUNDS, 1) == {5}


def test_the_plan_counts_who_goes_on():
    assert [ROUNDS.survivors(count) for count in (1, 4, 8, 10)] == [1, 1, 2, 3]


def test_a_round_that_could_never_be_full_is_refused():
    overrides = ["scheduler={type: rounds}", "max_concurrent_trials=7"]
    with pytest.raises(ValueError, match=r"max_concurrent_trials 7 is below scheduler.trials 8"):
        load_space("search_spaces/quickstart.yaml", overrides)


@pytest.mark.parametrize("wrong", ["trials: 1", "trials: 4, kept: 4", "steps: 0", "kept: 0", "keep: 2"])
def test_rounds_that_stop_nobody_are_refused(wrong):
    with pytest.raises(ValueError, match=r"scheduler"):
        load_space("search_spaces/quickstart.yaml", [f"scheduler={{type: rounds, {wrong}}}"])


@pytest.mark.ray
@pytest.mark.slow
def test_a_trial_that_waited_and_one_that_was_killed_train_as_if_undisturbed(project):
    """Curves are those of a sweep of the same trials without early stopping, as far as each went."""
    out = finished(command(project, "tune", *SWEEP, "--name", "rounds"))
    assert "rounds      of 3 trials, compared after 2 steps, 1 go on" in out
    found = list(ledger(project, "rounds").values())
    assert [record["status"] for record in found].count("finished") == 2
    for of_round in (found[:3], found[3:]):
        compared = {record["trial_id"]: record["curve"][0]["public_perplexity"] for record in of_round}
        (best,) = [record["trial_id"] for record in of_round if record["status"] == "finished"]
        assert best == min(compared, key=compared.get)
        assert all(len(record["curve"]) == 1 for record in of_round if record["trial_id"] != best)

    killed = command(project, "tune", *SWEEP, "--name", "rounds-killed")
    wait_for_a_report(killed, project, "rounds-killed")
    killed.kill()
    killed.communicate()
    finished(command(project, "tune", "--resume", "rounds-killed"))
    again = ledger(project, "rounds-killed")
    for record in found[:3]:
        assert again[record["trial_id"]]["config"] == record["config"]
        check_curve(again[record["trial_id"]], record)

    rates = [record["config"]["learning_rate"] for record in found]
    alone = finished(
        command(
            project, "tune", "--space", "space.yaml", "--name", "whole", "--set", "num_samples=1",
            "--set", "scheduler={type: fifo}", "--set", "search.epochs={choice: [6]}",
            "--set", f"search.learning_rate={{grid_search: {rates}}}",
        )
    )  # fmt: skip
    assert "6 trials ended" in alone or "6/6 trials ended" in alone
    whole = {record["config"]["learning_rate"]: record for record in ledger(project, "whole").values()}
    for record in found:
        check_curve(whole[record["config"]["learning_rate"]], record)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("points", [1, 2], ids=["while its round waits", "behind its comparison"])
def test_trials_whose_processes_are_killed_come_back_to_their_round(project, points):
    name = f"killed-{points}"
    process = command(project, "tune", *SWEEP, "--set", "search.epochs={choice: [30]}", "--name", name)
    deadline = time.monotonic() + 200
    while not any(len(record["curve"]) >= points for record in ledger(project, name).values()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    for victim in family(process, "ray::ImplicitFunc"):
        victim.kill()
    finished(process)
    statuses = [record["status"] for record in ledger(project, name).values()]
    assert sorted(statuses) == ["finished"] * 2 + ["stopped"] * 4


def check_curve(whole: dict, record: dict) -> None:
    known = {point["step"]: point["public_perplexity"] for point in whole["curve"]}
    for point in record["curve"]:
        if point["step"] in known:
            assert point["public_perplexity"] == pytest.approx(known[point["step"]], rel=1e-5)
