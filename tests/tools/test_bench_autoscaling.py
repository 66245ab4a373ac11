"""The simulated autoscaler: the controller's published rules by hand, and a load that ends as it must."""

import json
import sys

import numpy as np
import pytest
import yaml

from tools.bench import autoscaling
from tools.bench.autoscaling import HOUR, SYNC, Pod, Scaler, arrivals, reading_seconds, scalers, simulate
from tools.bench.hpa import DEFAULT_DOWN, DEFAULT_UP, Controller, Direction, Policy, external, of_pods

SLOW_DOWN = Direction(600, (Policy("Pods", 1, 120),))


@pytest.mark.parametrize(
    ("values", "starting", "target", "wanted"),
    [
        ([200, 200], 0, 100, 4),  # the documentation's: twice the target doubles the pods
        ([50, 50, 50, 50], 0, 100, 2),
        ([109], 0, 100, 1),  # within the tolerance
        ([111], 0, 100, 2),
        ([0, 0], 0, 100, 0),
        ([300], 1, 100, 3),  # the pod that starts counts as idle: 300 / 2 / 100 of two pods
        ([150], 1, 100, 2),  # which turns the direction: nothing changes
        ([50], 1, 100, 2),  # and as busy where fewer are wanted: (50 + 100) / 2 / 100 of two pods
        ([10, 10], 1, 100, 2),
    ],
)
def test_a_metric_of_pods(values, starting, target, wanted):
    assert of_pods(values, starting, target, len(values) + starting) == wanted


def test_without_metrics_nothing_changes():
    assert of_pods([], 3, 100, 3) == 3


@pytest.mark.parametrize(
    ("total", "replicas", "wanted"), [(300, 1, 3), (105, 1, 1), (95, 1, 1), (0, 3, 0), (201, 2, 2)]
)
def test_an_external_metric_knows_no_pods_that_start(total, replicas, wanted):
    assert external(total, 100, replicas) == wanted


def test_scaling_up_doubles_or_adds_four_whichever_is_more():
    controller = Controller(1, 100)
    assert controller.decide(0, 1, 50) == 5
    assert controller.decide(15, 5, 50) == 10
    assert controller.decide(30, 10, 50) == 20
    assert Controller(1, 8).decide(0, 6, 50) == 8


def test_a_policy_counts_what_its_period_has_seen():
    controller = Controller(1, 100, Direction(0, (Policy("Pods", 2, 60),)), DEFAULT_DOWN)
    assert [controller.decide(t, n, 50) for t, n in ((0, 1), (15, 3), (45, 3), (60, 3))] == [3, 3, 3, 5]


def test_scaling_down_waits_until_nothing_in_its_window_wanted_more():
    controller = Controller(1, 10)
    assert controller.decide(0, 8, 8) == 8
    assert [controller.decide(t, 8, 2) for t in (15, 150, 285)] == [8, 8, 8]
    assert controller.decide(300, 8, 2) == 2
    slow = Controller(1, 10, DEFAULT_UP, SLOW_DOWN)
    assert slow.decide(0, 4, 1) == 3, "a controller that knows no past scales at once"
    assert [slow.decide(t, 3, 1) for t in (60, 119)] == [3, 3]
    assert slow.decide(120, 3, 1) == 2


def test_never_fewer_than_the_minimum_nor_more_than_the_maximum():
    controller = Controller(2, 4)
    assert controller.decide(0, 2, 0) == 2
    assert controller.decide(0, 1, 1) == 2
    assert controller.decide(0, 4, 99) == 4


def test_a_pod_reads_one_prompt_after_the_other():
    pod = Pod(ready=0)
    assert [pod.take(10, 100, 5), pod.take(11, 200, 5), pod.take(30, 300, 5)] == [0, 4, 0]
    assert (pod.waiting(12), pod.queued_tokens(12), pod.in_flight(12)) == (2, 600, 3)
    assert (pod.waiting(16), pod.queued_tokens(16)) == (1, 500)
    assert (pod.waiting(99), pod.queued_tokens(99), pod.in_flight(99)) == (0, 0, 0)


def test_reading_takes_what_the_plan_says():
    """docs/benchmarks.md: 201 s for a million tokens at 55 % of the peak; half the peak is assumed."""
    million, short = reading_seconds(np.array([2**20, 2**10]))
    assert million == pytest.approx(201.4 * 0.552 / 0.5, rel=0.01)
    assert 0 < short < 0.01


def test_loads_are_drawn_anew_the_same_and_as_long_as_they_should_be():
    times, lengths = arrivals("step", 3)
    again, _ = arrivals("step", 3)
    np.testing.assert_array_equal(times, again)
    in_step = ((times >= HOUR) & (times < 2 * HOUR)).sum()
    assert in_step == pytest.approx(3.0 * HOUR, rel=0.05)
    assert lengths.min() >= 1024 and 2**19 < lengths.max() <= 2**20


@pytest.fixture(scope="module")
def manifest():
    return yaml.safe_load(autoscaling.HPA.read_text())


def test_more_pods_wait_less_and_ours_needs_fewer_than_the_most(manifest, monkeypatch):
    monkeypatch.setitem(autoscaling.LOADS, "step", (HOUR, lambda t: 3.0 if t > HOUR / 3 else 0.5))
    always = Scaler("n", lambda *_: 8, DEFAULT_UP, DEFAULT_DOWN)
    most = simulate(always, "step", 0, 8, 8)
    none = simulate(always, "step", 0, 2, 2)
    (ours,) = (simulate(s, "step", 0, 2, 8) for s in scalers(manifest) if s.name.startswith("ours: "))
    assert most.waits.mean() < ours.waits.mean() < none.waits.mean() / 2
    assert none.gpu_hours < ours.gpu_hours < most.gpu_hours
    assert most.changes == none.changes == 0 < ours.changes
    assert all((t % SYNC == 0) and 2 <= n <= 8 for t, n in ours.replicas)


def test_the_command_prints_a_table_and_draws(monkeypatch, capsys, tmp_path):
    for load in autoscaling.LOADS:
        monkeypatch.setitem(autoscaling.LOADS, load, (600, lambda t: 0.5))
    paths = [str(tmp_path / "a.png"), str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["autoscaling", "--seeds", "2", "--plot", paths[0], "--json", paths[1]])
    autoscaling.main()
    rows = json.loads((tmp_path / "a.json").read_text())
    assert len(rows) == 3 * 7 and capsys.readouterr().out.count("\n| ") == 3 * 7
    assert (tmp_path / "a.png").stat().st_size > 10_000
