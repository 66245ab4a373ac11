"""The six classes of answers, and the prompts that ask a judge for them.

The judge sees question, reference, distractors and answer, never the haystack. What is fixed comes first, so that a
server which keeps prefixes reads it once.
"""

from typing import Any

CORRECT = "correct"
NEAR_MISS = "near miss"
DISTRACTOR = "distractor"
HALLUCINATED = "hallucinated"
FALSE_REFUSAL = "false refusal"
CORRECT_REFUSAL = "correct refusal"
VERDICTS = {
    CORRECT: "the answer says what the reference says, in whatever words",
    NEAR_MISS: "the answer is the reference but for a small error, such as a wrong digit",
    DISTRACTOR: "the answer gives one of the distractors, which answer other questions",
    HALLUCINATED: "the answer gives something else, neither the reference nor a distractor",
    FALSE_REFUSAL: "the answer says that it is not to be found, and the reference gives something",
    CORRECT_REFUSAL: "both the answer and the reference say that it is not to be found",
}
"""What each class means, in the words that the judge reads."""
FIRST, SECOND, TIE = "first", "second", "tie"
"""What a judge says of two answers, by their place in the prompt."""


def is_right(verdict: str, has_answer: bool) -> bool:
    """Whether an answer of this class is right, to a question that has an answer in the document or has none."""
    return verdict == CORRECT or (verdict == CORRECT_REFUSAL and not has_answer)


def single_template() -> str:
    """The prompt about one answer, for `model_graded_qa`: {question}, {criterion}, {distractors} and {answer}."""
    classes = "\n".join(f"{name}: {meaning}" for name, meaning in VERDICTS.items())
    return (
        "You grade an answer to a question about a long document that you do not see. The reference is right. "
        f"The grades are:\n\n{classes}\n\n{{instructions}}\n\n"
        "[BEGIN DATA]\n[Question]: {question}\n[Reference]: {criterion}\n[Distractors]: {distractors}\n"
        "[Answer]: {answer}\n[END DATA]\n\nDo not answer the question, grade the answer."
    )


def pair_template() -> str:
    """The prompt about two answers, for `model_graded_qa`: as above, with {first} and {second} for {answer}."""
    return (
        "You compare two answers to a question about a long document that you do not see. The reference is right. "
        "The better answer is the one that says what the reference says, in whatever words; if both do, or neither "
        "does, the one whose error is smaller, or it is a tie.\n\n{instructions}\n\n"
        "[BEGIN DATA]\n[Question]: {question}\n[Reference]: {criterion}\n[Distractors]: {distractors}\n"
        "[First answer]: {first}\n[Second answer]: {second}\n[END DATA]\n\n"
        "Do not answer the question, compare the answers."
    )


def instructions(key: str, choices: tuple[str, ...], structured: bool) -> str:
    """How to reply: with JSON, or in words that end with `KEY: CHOICE`."""
    named = ", ".join(choices)
    if structured:
        return f'Reply with JSON, {{"{key}": "..."}}, where ... is one of: {named}.'
    return (
        f"First give your reason in one sentence. Then end with the line '{key.upper()}: ...' (without quotes), where "
        f"... is one of: {named}."
    )


def pattern(key: str, choices: tuple[str, ...]) -> str:
    """A regular expression whose group is the last choice that follows `key`, in words or in JSON."""
    longest_first = "|".join(sorted(choices, key=len, reverse=True))
    return rf"(?is).*\b{key}\b\W*({longest_first})\b"


def schema(key: str, choices: tuple[str, ...]) -> dict[str, Any]:
    """JSON schema of a structured reply."""
    return {
        "type": "object",
        "properties": {key: {"type": "string", "enum": list(choices)}},
        "required": [key],
        "additionalProperties": False,
    }
