"""Plans change time and memory, never the gradient (on two devices: tests/test_configurations.py)."""

import jax
import numpy as np
import pytest
from problems import assert_close, make, one_update

import jbptt
from jbptt import Plan, choose_plan, full_bptt
from jbptt.analysis import planning

T = 12


@pytest.mark.parametrize("make_estimator", [full_bptt, lambda *a, **k: jbptt.randomized_bptt(*a, keep_prob=0.7, **k)])
def test_a_plan_is_a_segment_and_more(make_estimator):
    problem = make("gru", T)
    found = [
        one_update(make_estimator(problem.step, problem.loss, **options), *problem[2:], jax.random.key(0)).grads
        for options in ({}, {"segment": 5}, {"plan": Plan(5)}, {"plan": Plan()})
    ]
    assert_close(found[1:], found[:1] * 3)


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
        (lambda: full_bptt(None, None, segment=3, plan=Plan(3)), "segment=3 and a plan were given"),
    ],
)
def test_wrong_plans(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_choice_is_measured_once_and_keeps_to_the_budget():
    problem = make("tanh", T)
    arguments = problem.step, problem.loss, *problem[2:]
    plans = Plan(2), Plan(T)
    plan, cost = choose_plan(*arguments, plans=plans, num_repeats=2)
    assert plan in plans and cost.names == tuple(map(str, plans)) and cost.seconds.shape == (2, 2)
    assert choose_plan(*arguments, plans=plans, num_repeats=2)[1] is cost  # not measured again
    small, large = sorted(cost.temporary_bytes)
    if small < large:
        within = choose_plan(*arguments, plans=plans, num_repeats=2, memory_budget=float(small))[0]
        assert within == plans[int(np.argmin(cost.temporary_bytes))]
    with pytest.raises(ValueError, match=r"the least that any candidate takes is .*segments of"):
        choose_plan(*arguments, plans=plans, num_repeats=2, memory_budget=1.0)
    with pytest.raises(ValueError, match="plans must name at least one"):
        choose_plan(*arguments, plans=())
    assert [p.segment for p in planning.candidate_plans(40, (3,))] == [None, 16, 32, 40]


def test_a_plan_needs_no_backend():
    """`jax_num_cpu_devices` must be settable after an estimator was made."""
    import subprocess
    import sys

    code = "import jax, jbptt; jbptt.full_bptt(lambda p, c, x: (c, x), lambda y, t: y); "
    code += "jax.config.update('jax_num_cpu_devices', 2); assert jax.device_count() == 2; "
    code += "print(jbptt.Plan(num_shards=2))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0 and "2 devices, the batch divided" in found.stdout, found.stderr
