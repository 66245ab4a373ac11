"""The judge's figures from its replies, as OUT has them in JSON.

    version         VERSION
    judges          model and base_url of each
    provenance      date, command, version, git_revision, hardware, python, jax
    config          as configured
    answers         n, and how many were settled by exact match, by the judge, and unscored
    accuracy        exact: by exact match alone; judged: with the judge, over what is scored
    by_length       accuracy judged, by tokens of the prompt, where these are known
    classes         the share of each class among the scored answers
    agreement       of the judge with exact match, on a random sample that it was asked about: observed, kappa
    retest          share of answers with the same class when asked a second time
    planted         answers of known class: sensitivity (right ones called right), specificity (wrong ones called
                    wrong), kappa over the six classes, and by class what the judge said
    pairs           planted pairs, and those of `against`: who wins, flip_rate, position_bias
    parse_failures  replies, or votes, without a verdict among all that was asked
    usage           by model: replies, kept (from the cache), tokens, cost in US dollars
    verdicts        each answer with its class, who decided, and what the judge wrote

A share is n, rate and a 95 % interval (`clustered_interval`), a statistic is its value and a 95 % interval
(`bootstrap_interval`); both by haystack.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mla_jax.evals.agreement import bootstrap_interval, cohens_kappa
from mla_jax.evals.cells import Rate
from mla_jax.evals.judge import verdicts as v
from mla_jax.evals.judge.items import Item
from mla_jax.evals.judge.questions import Pair, Questions
from mla_jax.evals.judge.session import Reply
from mla_jax.evals.stats import clustered_interval

VERSION = 1


def share(scores: Sequence[float], items: Sequence[Item]) -> dict[str, Any]:
    """A mean of scores between 0 and 1, with its interval; without any, n is 0."""
    if not scores:
        return {"n": 0, "rate": math.nan, "interval": [0.0, 1.0]}
    interval = clustered_interval(scores, [item.haystack for item in items])
    return Rate(len(scores), math.fsum(scores) / len(scores), interval).to_json()


def statistic(samples: list, items: Sequence[Item], of: Callable[[list], float]) -> dict[str, Any]:
    """A statistic of samples, with its interval."""
    interval = bootstrap_interval(samples, [item.haystack for item in items], of) if samples else (math.nan, math.nan)
    return {"value": of(samples), "interval": list(interval)}


def is_right(item: Item, verdict: str) -> float:
    """1 if the class is that of a right answer to this question, else 0."""
    return float(v.is_right(verdict, item.has_answer))


def metrics_of(report: dict[str, Any], prefix: str) -> dict[str, float]:
    """The main figures by name, for trackers; those that are undefined are left out."""
    rates = {
        "accuracy": report["accuracy"]["judged"],
        "retest": report["retest"]["same"],
        "sensitivity": report["planted"]["sensitivity"],
        "specificity": report["planted"]["specificity"],
        "flip_rate": report["pairs"]["flip_rate"],
        **{name.replace(" ", "_"): each for name, each in report["classes"].items()},
    }
    found = {name: rate["rate"] for name, rate in rates.items()}
    found |= {
        "kappa": report["agreement"]["kappa"]["value"],
        "position_bias": report["pairs"]["position_bias"]["value"],
    }
    return {f"{prefix}/{name}": value for name, value in found.items() if math.isfinite(value)}


def of_answers(items: list[Item], replies: list[Reply]) -> dict[str, Any]:
    """Accuracy and classes of the answers."""
    scored = [(item, reply.verdict) for item, reply in zip(items, replies, strict=True) if reply.verdict is not None]
    known, said = [item for item, _ in scored], [verdict for _, verdict in scored]
    lengths = sorted({item.length for item in known if item.length is not None})
    return {
        "answers": {
            "n": len(items),
            "settled_by_exact_match": sum(item.exact for item in items),
            "settled_by_judge": len(scored) - sum(item.exact for item in items),
            "unscored": len(items) - len(scored),
        },
        "accuracy": {
            "exact": share([float(item.exact) for item in items], items),
            "judged": share([is_right(item, verdict) for item, verdict in scored], known),
        },
        "by_length": {
            str(length): share(
                [is_right(item, verdict) for item, verdict in scored if item.length == length],
                [item for item in known if item.length == length],
            )
            for length in lengths
        },
        "classes": {name: share([float(verdict == name) for verdict in said], known) for name in v.VERDICTS},
    }


def agreement(asked: list[tuple[Item, Reply]]) -> dict[str, Any]:
    """Right or wrong, by exact match and by the judge: what share is the same, and Cohen's kappa."""
    scored = [(item, (item.exact, bool(is_right(item, r.verdict)))) for item, r in asked if r.verdict is not None]
    items, pairs = [item for item, _ in scored], [pair for _, pair in scored]
    return {
        "unscored": len(asked) - len(scored),
        "observed": share([float(one == other) for one, other in pairs], items),
        "kappa": statistic(pairs, items, cohens_kappa),
        "exact_right": {"judged_right": pairs.count((True, True)), "judged_wrong": pairs.count((True, False))},
        "exact_wrong": {"judged_right": pairs.count((False, True)), "judged_wrong": pairs.count((False, False))},
    }


def retest(asked: list[tuple[Item, Reply, Reply]]) -> dict[str, Any]:
    """The share of answers with the same class at both times, among those that had one."""
    both = [(item, one.verdict == other.verdict) for item, one, other in asked if one.verdict and other.verdict]
    same = share([float(same) for _, same in both], [item for item, _ in both])
    return {"unscored": len(asked) - len(both), "same": same}


def planted(questions: Questions, replies: list[Reply]) -> dict[str, Any]:
    """Verdicts on answers whose class is known, counted."""
    pairs = [
        (each.item, each.verdict, reply.verdict)
        for each, reply in zip(questions.planted, replies, strict=True)
        if reply.verdict is not None
    ]
    right = [(item, is_right(item, said)) for item, made, said in pairs if is_right(item, made)]
    wrong = [(item, 1 - is_right(item, said)) for item, made, said in pairs if not is_right(item, made)]
    by_class = {}
    for name in v.VERDICTS:
        said = [(item, said) for item, made, said in pairs if made == name]
        rightly = share([float(verdict == name) for _, verdict in said], [item for item, _ in said])
        by_class[name] = {"called_so": rightly, "said": dict(Counter(verdict for _, verdict in said))}
    return {
        "unscored": len(replies) - len(pairs),
        "sensitivity": share([score for _, score in right], [item for item, _ in right]),
        "specificity": share([score for _, score in wrong], [item for item, _ in wrong]),
        "kappa": statistic([(m, s) for _, m, s in pairs], [item for item, _, _ in pairs], cohens_kappa),
        "by_class": by_class,
    }


def pairs(questions: Questions, planted_replies: list[Reply], against: list[Reply | None]) -> dict[str, Any]:
    """Who wins, and how much the judge goes by the place of an answer. A reply of None stands for a tie unasked."""
    made = [each.item for each in questions.planted_pairs]
    asked = list(zip(made, planted_replies, strict=True))
    asked += [(p.item, reply) for p, reply in zip(questions.against, against, strict=True) if reply is not None]
    both = [(item, reply.orders) for item, reply in asked if None not in reply.orders]
    flips = [float(one == other != v.TIE) for _, (one, other) in both]
    decisive = [(item, said) for item, reply in asked for said in reply.orders if said in (v.FIRST, v.SECOND)]
    return {
        "planted": _outcome(made, planted_replies),
        "against": _outcome([pair.item for pair in questions.against], against) | _unasked(questions.against),
        "flip_rate": share(flips, [item for item, _ in both]),
        "position_bias": statistic([said for _, said in decisive], [item for item, _ in decisive], _position_bias),
    }


def _unasked(against: list[Pair]) -> dict[str, int]:
    return {"ties_unasked": sum(pair.is_tie for pair in against)}


def _outcome(items: list[Item], replies: Sequence[Reply | None]) -> dict[str, Any]:
    """Wins, ties and losses of the first answer, and its score: a win counts 1, a tie 1/2."""
    said = [v.TIE if reply is None else reply.verdict for reply in replies]
    scored = [(item, _POINTS[verdict]) for item, verdict in zip(items, said, strict=True) if verdict is not None]
    return {
        "n": len(items),
        "wins": said.count(v.FIRST),
        "ties": said.count(v.TIE),
        "losses": said.count(v.SECOND),
        "unscored": said.count(None),
        "score": share([points for _, points in scored], [item for item, _ in scored]),
    }


_POINTS = {v.FIRST: 1.0, v.TIE: 0.5, v.SECOND: 0.0}


def _position_bias(said: list[str]) -> float:
    """Share of decisions for what stood first less that for what stood second: 0 without a preference, 1 at most."""
    return (said.count(v.FIRST) - said.count(v.SECOND)) / len(said) if said else math.nan
