"""Prints what a serving pod must be told for long contexts: time-outs, queue limits, the autoscaler's target.

`python -m tools.plan_serving [model=NAME] [gpu=NAME] [max_model_len=N] [answer_tokens=N] [model.KEY=VALUE ...]`
"""

import argparse

from experiments.entry import compose_config
from mla_jax.errors import UsageError, one_line_errors
from mla_jax.inference.serving_plan import MARGIN, PRE_STOP, SERVING_GPUS, TARGET_SECONDS, ServingPlan

DEFAULTS = {"gpu": "h200", "max_model_len": "", "answer_tokens": "4096"}


def _number(key: str, text: str) -> int:
    if not text.isdigit():
        raise UsageError(f"{key} must be a whole number, got {text!r}")
    return int(text)


def report(plan: ServingPlan) -> str:
    """A line for each setting, as Markdown: where it goes, its value, why."""
    rows = [
        ("max-model-len", plan.max_model_len, f"the cache holds {plan.cache_tokens:,} tokens"),
        ("max-num-queued-tokens", plan.max_num_queued_tokens, "above it a pod answers 503"),
        (
            "shutdown-timeout", plan.shutdown_timeout,
            f"that queue, one more prompt ({plan.longest_prefill:.0f} s) and its answer ({plan.longest_answer:.0f} s)",
        ),
        ("preStop sleep", PRE_STOP, "until proxies know"),
        ("terminationGracePeriodSeconds", plan.termination_grace_period, f"the two above, and {MARGIN} s"),
        ("queued tokens a pod", plan.queued_tokens_target, f"the autoscaler's target: {TARGET_SECONDS} s of reading"),
    ]  # fmt: skip
    return "\n".join(
        ["| setting | value | why |", "|---|---:|---|", *(f"| {name} | {value} | {why} |" for name, value, why in rows)]
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan_serving", description="Time-outs, queue limits and scaling targets of a serving pod."
    )
    parser.add_argument(
        "pairs", nargs="*", metavar="KEY=VALUE",
        help=f"model=NAME (default: infinite_1b), model.KEY=VALUE, gpu=NAME ({', '.join(SERVING_GPUS)}; default: "
        "h200), max_model_len=N (default: the model's limit), answer_tokens=N (default: 4096)",
    )  # fmt: skip
    with one_line_errors():
        own, overrides = dict(DEFAULTS), []
        for pair in parser.parse_args().pairs:
            key, equals, value = pair.partition("=")
            if key in own and equals:
                own[key] = value
            else:
                overrides.append(pair)
        if not any(pair.startswith("model=") for pair in overrides):
            overrides.insert(0, "model=infinite_1b")
        config = compose_config(overrides).model
        length = own["max_model_len"] or str(config.max_position_embeddings)
        plan = ServingPlan.of(
            config, own["gpu"], _number("max_model_len", length), _number("answer_tokens", own["answer_tokens"])
        )
        print(report(plan))


if __name__ == "__main__":
    main()
