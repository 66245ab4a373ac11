"""Asks all questions of a plan, one measure after the other, and makes the report of the replies."""

import dataclasses
from typing import Any

from inspect_ai.scorer import cascade

from mla_jax.config import EndpointConfig
from mla_jax.evals.judge import report
from mla_jax.evals.judge import verdicts as v
from mla_jax.evals.judge.items import Item
from mla_jax.evals.judge.questions import Questions, pair_sample, sample_of
from mla_jax.evals.judge.scorers import BETTER, GRADE, PLACES, exact, judged, pairwise
from mla_jax.evals.judge.session import Reply, Session, Usage
from mla_jax.evals.provenance import provenance


def measure(session: Session, questions: Questions) -> dict[str, Any]:
    """The report, as `report` describes it.

    Raises:
        InputError: an endpoint failed.
        UsageError: the variable of a key is not set.
    """
    config, items = session.config, questions.items
    single = judged(session.judges(GRADE, tuple(v.VERDICTS)), config.structured)
    again = judged(session.judges(GRADE, tuple(v.VERDICTS), again=True), config.structured)
    pairwise_judge = pairwise(session.judges(BETTER, PLACES), config.structured)

    replies = session.ask("answers", [sample_of(item) for item in items], cascade(exact=exact(), judge=single))
    checked = session.ask("agreement", [sample_of(items[i]) for i in questions.checked], single)
    by_judge = {i: reply for i, reply in enumerate(replies) if not items[i].exact}
    by_judge |= dict(zip(questions.checked, checked, strict=True))
    retested = session.ask("retest", [sample_of(items[i]) for i in questions.retested], again)
    planted = session.ask("planted", [sample_of(each.item) for each in questions.planted], single)
    made = [pair_sample(each.item, each.right, each.wrong) for each in questions.planted_pairs]
    pairs = session.ask("pairs", made, pairwise_judge)
    open_pairs = [pair for pair in questions.against if not pair.is_tie]
    compared = [pair_sample(pair.item, pair.item.answer, pair.other.answer) for pair in open_pairs]
    in_order = iter(session.ask("against", compared, pairwise_judge))
    against = [None if pair.is_tie else next(in_order) for pair in questions.against]

    asked = [*by_judge.values(), *retested, *planted, *pairs, *(reply for reply in against if reply)]
    return {
        "version": report.VERSION,
        "judges": [{"model": each.model, "base_url": each.base_url} for each in config.judges],
        "provenance": provenance(),
        "config": dataclasses.asdict(config),
        **report.of_answers(items, replies),
        "agreement": report.agreement([(items[i], by_judge[i]) for i in questions.compared]),
        "retest": report.retest(
            [(items[i], by_judge[i], reply) for i, reply in zip(questions.retested, retested, strict=True)]
        ),
        "planted": report.planted(questions, planted),
        "pairs": report.pairs(questions, pairs, against),
        "parse_failures": {"asked": len(asked), "unscored": sum(reply.verdict is None for reply in asked)},
        "usage": {each.model: _usage(session.usage.get(each.model, Usage()), each) for each in config.judges},
        "verdicts": [_verdict(item, reply) for item, reply in zip(items, replies, strict=True)],
    }


def _usage(usage: Usage, endpoint: EndpointConfig) -> dict[str, Any]:
    """Counts and cost; null without prices."""
    cost = None
    if endpoint.input_price is not None and endpoint.output_price is not None:
        cost = (usage.input_tokens * endpoint.input_price + usage.output_tokens * endpoint.output_price) / 1e6
    return {**dataclasses.asdict(usage), "cost": cost}


def _verdict(item: Item, reply: Reply) -> dict[str, Any]:
    kept = {key: value for key, value in dataclasses.asdict(item).items() if value is not None}
    return {**kept, "verdict": reply.verdict, "decided_by": reply.decided_by, "reply": reply.text}
