"""Scorers for Inspect: exact match, a judge or a panel of them, and the pairwise comparison that Inspect has not.

A scorer gives C or I (Inspect's correct and incorrect), with what was said as `verdict` in the metadata, or leaves the
sample unscored if a reply has no verdict in it. Sample metadata: `distractors`; `exact`, the class that exact match
gives or ""; for pairs `first` and `second`.
"""

import copy
from collections.abc import Sequence

from inspect_ai.model import Model
from inspect_ai.scorer import (
    CORRECT,
    INCORRECT,
    Score,
    Scorer,
    Target,
    accuracy,
    model_graded_qa,
    multi_scorer,
    scorer,
    stderr,
)
from inspect_ai.solver import TaskState

from mla_jax.data.needle.questions import REFUSAL
from mla_jax.evals.judge import verdicts as v

GRADE, BETTER = "grade", "better"
"""The words before a verdict in a reply, for one answer and for two."""
PLACES = (v.FIRST, v.SECOND, v.TIE)


@scorer(metrics=[accuracy(), stderr()])
def exact() -> Scorer:
    """Correct where exact match says so; anything else it leaves open, to the next stage of a `cascade`."""

    async def score(state: TaskState, target: Target) -> Score | None:
        verdict = state.metadata["exact"]
        return Score(value=CORRECT, metadata={"verdict": verdict}) if verdict else None

    return score


@scorer(metrics=[accuracy(), stderr()])
def judged(judges: Sequence[Model], structured: bool) -> Scorer:
    """One of the six classes; with several judges, the one that more than half of them give."""
    panel = _panel(judges, v.single_template(), GRADE, tuple(v.VERDICTS), structured)

    async def score(state: TaskState, target: Target) -> Score:
        found = await _ask(panel, state, target)
        verdict = _verdict(found)
        return found if verdict is None else _scored(found, verdict, v.is_right(verdict, target.text != REFUSAL))

    return score


@scorer(metrics=[accuracy(), stderr()])
def pairwise(judges: Sequence[Model], structured: bool) -> Scorer:
    """`first` or `second` wins if the judges prefer it in both orders; if they do not, or say so, it is a tie.

    Metadata `orders` has what was said in the two orders: by the place in the prompt, so [first, first] is a judge who
    likes what it reads first. C stands for a win of `first`.
    """
    panel = _panel(judges, v.pair_template(), BETTER, PLACES, structured)

    async def score(state: TaskState, target: Target) -> Score:
        swapped = copy.copy(state)
        swapped.metadata = state.metadata | {"first": state.metadata["second"], "second": state.metadata["first"]}
        found = [await _ask(panel, each, target) for each in (state, swapped)]
        one, other = (_verdict(each) for each in found)
        kept = Score.unscored(
            reason="grader_failed",
            explanation="\n---\n".join(each.explanation or "" for each in found),
            metadata={"orders": [one, other]},
        )
        if one is None or other is None:
            return kept
        won = one if _OTHER_PLACE[one] == other else v.TIE
        return _scored(kept.model_copy(update={"reason": None}), won, won == v.FIRST)

    return score


_OTHER_PLACE = {v.FIRST: v.SECOND, v.SECOND: v.FIRST, v.TIE: v.TIE}
"""Where an answer stands in the other order."""


def _panel(judges: Sequence[Model], template: str, key: str, choices: tuple[str, ...], structured: bool) -> Scorer:
    """A scorer whose value is one of `choices`, by strict majority of the judges."""
    how, pattern = v.instructions(key, choices, structured), v.pattern(key, choices)

    def alone(judge: Model) -> Scorer:
        graded = model_graded_qa(template=template, instructions=how, grade_pattern=pattern, model=judge)

        async def score(state: TaskState, target: Target) -> Score:
            found = await _ask(graded, state, target)
            verdict = _verdict(found)
            return found if verdict is None else found.model_copy(update={"value": verdict.lower()})

        return score

    return multi_scorer([alone(judge) for judge in judges], "majority")


async def _ask(scorer: Scorer, state: TaskState, target: Target) -> Score:
    """The score of a scorer that always gives one."""
    found = await scorer(state, target)
    assert found is not None
    return found


def _verdict(score: Score) -> str | None:
    """The value of a score; None if it is unscored, for which Inspect has nan."""
    return score.value if isinstance(score.value, str) else None


def _scored(found: Score, verdict: str, correct: bool) -> Score:
    metadata = (found.metadata or {}) | {"verdict": verdict}
    return found.model_copy(update={"value": CORRECT if correct else INCORRECT, "metadata": metadata})
