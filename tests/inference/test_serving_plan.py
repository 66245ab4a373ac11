"""Serving plans against what was measured (docs/benchmarks.md), and against each other."""

import dataclasses

import pytest

from experiments.entry import compose_config
from mla_jax.errors import UsageError
from mla_jax.inference.serving_plan import PRE_STOP, PREFILL_SHARE, SERVING_GPUS, TARGET_SECONDS, ServingPlan

MILLION = 2**20


@pytest.fixture(scope="module")
def infinite_1b():
    return compose_config(["model=infinite_1b"]).model


@pytest.mark.parametrize(("tokens", "measured"), [(2**17, 3.50), (2**19, 51.1), (2**20, 201.4)])
def test_prefill_is_planned_a_little_slower_than_measured(infinite_1b, tokens, measured):
    """One H200, 2026-11-26: about 55 % of the nominal peak at each length."""
    planned = ServingPlan.of(infinite_1b, "h200", tokens, 1).longest_prefill
    assert measured < planned < 1.25 * measured


def test_a_pod_drains_longer_than_its_queue_takes(infinite_1b):
    plan = ServingPlan.of(infinite_1b, "h200", MILLION, 4096)
    assert plan.max_num_queued_tokens == 2 * MILLION
    assert plan.shutdown_timeout >= int(3 * plan.longest_prefill + plan.longest_answer) > 3 * 201
    assert plan.termination_grace_period > PRE_STOP + plan.shutdown_timeout
    assert plan.queued_tokens_target < MILLION < plan.max_num_queued_tokens


def test_many_short_prompts_are_queued_where_they_are_read_fast(infinite_1b):
    plan = ServingPlan.of(infinite_1b, "h200", 2**17, 4096)
    assert plan.queued_tokens_target / 2**17 * plan.longest_prefill == pytest.approx(TARGET_SECONDS, rel=0.01)
    assert plan.max_num_queued_tokens == 2 * plan.queued_tokens_target


def test_a_slower_gpu_is_given_longer(infinite_1b):
    plans = [ServingPlan.of(infinite_1b, gpu, 2**17, 1024) for gpu in ("h200", "a100_80gb", "l4")]
    assert [p.shutdown_timeout for p in plans] == sorted(p.shutdown_timeout for p in plans)
    assert [-p.cache_tokens for p in plans] == sorted(-p.cache_tokens for p in plans)
    assert 0 < PREFILL_SHARE < 0.55


@pytest.mark.parametrize("gpu", SERVING_GPUS)
def test_every_gpu_has_a_plan(infinite_1b, gpu):
    plan = ServingPlan.of(infinite_1b, gpu, 2**17, 1024)
    assert 0 < plan.longest_prefill < plan.shutdown_timeout < plan.termination_grace_period


@pytest.mark.parametrize(
    ("gpu", "length", "answer", "message"),
    [
        ("h300", MILLION, 1, "gpu=h300 is unknown; known: h200"),
        ("h200", 2 * MILLION, 1, r"max_model_len <= 1,048,576 \(the model's limit\)"),
        ("h200", 4096, 4096, "answer_tokens=4,096 and max_model_len=4,096"),
        ("h200", 4096, 0, "answer_tokens=0 and"),
    ],
)
def test_impossible_plans_are_refused(infinite_1b, gpu, length, answer, message):
    with pytest.raises(UsageError, match=message):
        ServingPlan.of(infinite_1b, gpu, length, answer)


def test_a_cache_that_does_not_fit_is_refused_with_what_would(infinite_1b):
    large = dataclasses.replace(infinite_1b, num_hidden_layers=80)
    with pytest.raises(
        UsageError, match=r"max_model_len=1,048,576 does not fit gpu=l4: .* its cache holds [\d,]+ tokens"
    ):
        ServingPlan.of(large, "l4", MILLION, 4096)
    huge = dataclasses.replace(infinite_1b, num_hidden_layers=800)
    with pytest.raises(UsageError, match="its cache holds 0 tokens"):
        ServingPlan.of(huge, "l4", MILLION, 4096)
