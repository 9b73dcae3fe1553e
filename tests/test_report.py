"""A sweep's report says what is so, how sure that is, and needs nothing but the file."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from reporting.intervals import bootstrap_interval, compare
from reporting.sweep_page import SweepReport, importance, write_sweep_page
from reporting.verdicts import TrialReport, verdict

VOID = {"meta", "br", "img", "link", "input", "hr"}


def trial(name: str, perplexities, status="finished", first=20.0, **settings) -> TrialReport:
    curve = (
        [(25.0, first), (100.0, float(np.mean(perplexities)))]
        if status == "finished"
        else [(25.0, float(np.mean(perplexities)))]
    )
    return TrialReport(
        name,
        {"learning_rate": 1e-3, "lora_r": 8, "epochs": "1+1", **settings},
        status,
        "",
        curve,
        list(perplexities),
        1.5,
        100.0,
        0.0,
        60.0,
    )


def sweep(trials, name="one") -> SweepReport:
    return SweepReport(
        name, 50.0, trials, 0.4, 125.0, "models:/one/1: the first version of this model.", {"seed": 0}
    )


def test_an_interval_is_that_of_the_theory():
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap_interval(values.tolist())
    half = 1.96 * values.std() / 400**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)
    assert bootstrap_interval([3.0] * 5) == pytest.approx((3.0, 3.0))


def test_trials_are_compared_on_the_same_examples():
    """Examples differ much more than trials do; that does not hide a difference which every example shows."""
    hard = np.random.default_rng(2).lognormal(2, 1, 60)
    difference, low, high = compare(hard, hard + 0.5)
    assert difference == pytest.approx(-0.5)
    assert low == pytest.approx(high) == pytest.approx(-0.5)
    assert bootstrap_interval(hard)[1] - bootstrap_interval(hard)[0] > 2


@pytest.mark.parametrize(
    ("gap", "words"), [(1.0, "It is better than its runner-up"), (0.0, "It can't be told from its runner-up")]
)
def test_the_verdict_says_whether_the_best_can_be_told_from_the_runner_up(gap, words):
    generator = np.random.default_rng(3)
    values = generator.lognormal(2, 0.5, 50)
    noise = generator.normal(0, 0.3, 50)
    assert words in verdict(
        [trial("a", values), trial("b", values + gap + noise - noise.mean() + 1e-6)], 50.0
    )


def test_the_setting_that_matters_is_found():
    generator = np.random.default_rng(4)
    trials = [
        trial(
            f"t{n}",
            [10.0],
            learning_rate=rate,
            lora_r=int(generator.choice([4, 8, 16])),
            first=10 + 5 * abs(np.log10(rate) + 3),
        )
        for n, rate in enumerate(10 ** generator.uniform(-5, -2, 24))
    ]
    shares = importance(trials)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["learning_rate"] > 0.8
    assert importance(trials[:4]) == {}


def test_a_seed_is_told_and_not_said_to_matter(tmp_path):
    generator = np.random.default_rng(0)
    rates = 10 ** generator.uniform(-5, -2, 24)
    trials = [
        trial(f"t{n}", [10.0], learning_rate=rate, seed=1000 + n, first=10 + abs(np.log10(rate) + 3))
        for n, rate in enumerate(rates)
    ]
    assert set(importance(trials)) == {"learning_rate"}
    write_sweep_page(tmp_path / "page.html", sweep(trials))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(str(1000 + n) in page for n in range(24))
    for seeds_alone in (1, 12):  # nothing that was chosen differs
        same = [trial(f"t{n}", [10.0 + n], seed=n) for n in range(seeds_alone)]
        write_sweep_page(tmp_path / "page.html", sweep(same))


class Balanced(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(tmp_path):
    trials = [
        trial("good", [9.0, 11.0], lora_r=16),
        trial("stopped", [30.0, 34.0], status="stopped"),
        TrialReport(
            "dead", trial("", [1.0]).settings, "failed", "<b>out & out</b>", [], (), None, None, 0.0, None
        ),
    ]
    write_sweep_page(tmp_path / "report.html", sweep(trials, "<script>alert(1)</script>"))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    assert "<script" not in page
    assert "&lt;b&gt;out &amp; out&lt;/b&gt;" in page
    outside = [
        link
        for link in re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?([^\"')\s>]+)", page)
        if not link.startswith("#")
    ]
    assert not outside
    assert "prefers-color-scheme" in page or "color-scheme: light dark" in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) >= 2
    for picture in pictures:
        ElementTree.fromstring(picture)
        assert "currentColor" in picture
    assert page.index(">good<") < page.index(">stopped<") < page.index(">dead<")


def test_a_sweep_without_an_evaluated_runner_up_has_a_report(tmp_path):
    write_sweep_page(tmp_path / "report.html", sweep([trial("only", [9.0, 11.0])]))
    assert "Trial only is best: public perplexity 10" in (tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
