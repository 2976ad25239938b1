"""Plans change time and memory, never the gradient (on two devices: tests/test_configurations.py)."""

import functools
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from problems import assert_close, make, one_update, usual

import jbptt
from jbptt import Plan, choose_plan, full_bptt
from jbptt.analysis import plan_search
from jbptt.analysis.costs import Cost
from jbptt.executables import WeakCache

T = 12


def cut_at_random(*functions, **options):
    return jbptt.randomized_bptt(*functions, keep_prob=0.7, **options)


@pytest.mark.parametrize("make_estimator", usual([cut_at_random], [full_bptt, cut_at_random]))
def test_a_plan_is_a_segment_and_more(make_estimator):
    problem = make("gru", T)
    found = [
        one_update(make_estimator(problem.step, problem.loss, **options), *problem[2:], jax.random.key(0)).grads
        for options in ({}, {"plan": Plan(5)}, {"plan": Plan()})
    ]
    assert_close(found[1:], found[:1] * 2)


def test_plans_print_themselves():
    assert str(Plan()) == "segments of default length on one device"
    assert str(Plan(32)) == "segments of 32 steps on one device"
    assert Plan(32) == Plan(segment=32, num_shards=1) and hash(Plan(32)) == hash(Plan(32))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Plan(0), "segment must be"),
        (lambda: Plan(num_shards=0), "num_shards must be"),
        (lambda: Plan(num_shards=64), r"at most the number of devices, \d+, got 64.*jax_num_cpu_devices"),
        (lambda: full_bptt(None, None, plan=32), "plan must be a jbptt.Plan, got int"),
        (lambda: Plan(parallel_windows=0), "parallel_windows must be"),
        (
            lambda: full_bptt(None, None, plan=Plan(parallel_windows=3)),
            "plan must leave parallel_windows at None, got 3: only the windows of truncated_bptt",
        ),
        (
            lambda: jbptt.truncated_bptt(None, None, window=3, stride=1, plan=Plan(2)),
            "plan must leave segment at None, got 2: windows that overlap",
        ),
    ],
)
def test_wrong_plans(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_choice_is_measured_once():
    problem = make("tanh", T)
    arguments = problem.step, problem.loss, *problem[2:]
    plans = Plan(2), Plan(T)
    plan, cost = choose_plan(*arguments, plans=plans, num_repeats=2)
    assert plan in plans and cost.names == tuple(map(str, plans)) and cost.seconds.shape == (2, 2)
    assert np.all(cost.temporary_bytes > 0)
    assert choose_plan(*arguments, plans=plans, num_repeats=2)[1] is cost  # not measured again


def measured(monkeypatch, seconds, sizes):
    """`measure_cost` finds these numbers."""

    def found(estimators, *_, **__):
        return Cost(tuple(estimators), *(np.array([of[n] for n in estimators]) for of in (seconds, sizes, sizes)))

    monkeypatch.setattr(plan_search, "_CHOICES", WeakCache())
    monkeypatch.setattr(plan_search, "measure_cost", found)


def test_the_choice_is_the_fastest_within_the_budget(monkeypatch):
    problem = make("tanh", T)
    plans = Plan(2), Plan(2), Plan(3), Plan(T)
    names = list(dict.fromkeys(map(str, plans)))
    measured(
        monkeypatch, dict(zip(names, ([3.0], [2.0], [1.0]), strict=True)), dict(zip(names, (8, 16, 32), strict=True))
    )
    choose = functools.partial(choose_plan, problem.step, problem.loss, *problem[2:], plans=plans)
    for budget, segment in ((None, T), (32, T), (31, 3), (16, 3), (8.5, 2)):
        assert choose(memory_budget=budget)[0] == Plan(segment)
    for budget, words in (
        (7, r"the least that any candidate takes is 8 .*segments of 2 steps"),
        ("1MB", "memory_budget must be a finite number"),
        (0, "memory_budget must be a finite number"),
    ):
        with pytest.raises(ValueError, match=words):
            choose(memory_budget=budget)
    with pytest.raises(ValueError, match="plans must name at least one"):
        choose(plans=())
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(lambda params: choose_plan(problem.step, problem.loss, params, *problem[3:]))(problem.params)

    measured(monkeypatch, dict.fromkeys(names, np.ones(1)), dict.fromkeys(names, np.nan))
    with pytest.raises(ValueError, match="does not say how much"):
        choose(memory_budget=8)


@dataclass
class Unhashable:
    """A step that compares by value, as data classes do."""

    run: object

    def __call__(self, *args):
        return self.run(*args)


def test_a_step_that_cannot_be_hashed_is_measured_anew():
    problem = make("tanh", T)
    arguments = Unhashable(problem.step), problem.loss, *problem[2:]
    found = [choose_plan(*arguments, plans=(Plan(2),), num_repeats=1) for _ in range(2)]
    assert found[0][0] == Plan(2) and found[0][1] is not found[1][1]


@pytest.mark.parametrize(("num_steps", "segments"), [(T, [None]), (520, [None, 16, 32, 128, 256, 520])])
def test_candidates(num_steps, segments):
    """None is all of T up to 512 steps, and 64 at 520."""
    problem = make("tanh", num_steps)
    found = plan_search.candidate_plans(problem.step, problem.loss, *problem[2:])
    assert [plan.segment for plan in found if plan.num_shards == 1] == segments


def test_a_plan_needs_no_backend():
    """`jax_num_cpu_devices` must be settable after an estimator was made."""
    import subprocess
    import sys

    code = "import jax, jbptt; jbptt.full_bptt(lambda p, c, x: (c, x), lambda y, t: y); "
    code += "jax.config.update('jax_num_cpu_devices', 2); assert jax.device_count() == 2; "
    code += "print(jbptt.Plan(num_shards=2))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "2 devices, the batch divided" in found.stdout, found.stderr
