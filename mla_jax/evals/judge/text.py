"""The report of a judge as text: what it says, and what that is worth."""

import math
from typing import Any

_LANDIS_KOCH = ((0.2, "slight"), (0.4, "fair"), (0.6, "moderate"), (0.8, "substantial"), (1.0, "almost perfect"))
"""Upper ends of Landis and Koch's words for kappa (Biometrics 33, 1977); below 0 it is "poor"."""


def in_words(kappa: float) -> str:
    """Landis and Koch's word for a kappa; "undefined" for nan."""
    if math.isnan(kappa):
        return "undefined"
    return "poor" if kappa < 0 else next(word for end, word in _LANDIS_KOCH if round(kappa, 9) <= end)


def worth(report: dict[str, Any]) -> str:
    """One sentence about the judge, from what it said of planted answers (Youden's J = sensitivity + specificity - 1).

    A judge that throws a coin has J = 0, one that calls everything right too.
    """
    planted = report["planted"]
    right, wrong = planted["sensitivity"], planted["specificity"]
    if not right["n"] or not wrong["n"]:
        return "Nothing was planted, or no reply about it had a verdict: nothing is known about this judge's error."
    youden = right["rate"] + wrong["rate"] - 1
    kappa = report["agreement"]["kappa"]["value"]
    said = (
        f"of planted answers it calls {_percent(right['rate'])} of the right ones right and "
        f"{_percent(wrong['rate'])} of the wrong ones wrong (J = {youden:.2f}), and its kappa with exact match is "
        f"{kappa:.2f} ({in_words(kappa)})"
    )
    if right["interval"][0] + wrong["interval"][0] - 1 <= 0:
        return f"This judge is not shown to be better than guessing: {said}. Go by exact match."
    if youden < 0.8:
        return f"A weak judge: {said}. Read its figures with that error in mind."
    return f"This judge is right about most: {said}."


def format_report(report: dict[str, Any]) -> str:
    """Some thirty lines."""
    counts, agreement, planted, pairs = report["answers"], report["agreement"], report["planted"], report["pairs"]
    failures = report["parse_failures"]
    rows = [
        ("accuracy by exact match", _share(report["accuracy"]["exact"])),
        ("accuracy with the judge", _share(report["accuracy"]["judged"])),
        *((f"  {length} tokens", _share(each)) for length, each in report["by_length"].items()),
        *((f"  {name}", _share(each)) for name, each in report["classes"].items()),
        (),
        ("agreement with exact match", _share(agreement["observed"])),
        ("  Cohen's kappa", _kappa(agreement["kappa"])),
        ("same class when asked again", _share(report["retest"]["same"])),
        (),
        ("planted right, called right", _share(planted["sensitivity"])),
        ("planted wrong, called wrong", _share(planted["specificity"])),
        ("  kappa over six classes", _kappa(planted["kappa"])),
        *((f"  {name}", _called(each)) for name, each in planted["by_class"].items()),
        (),
        ("right against wrong answer", _outcome(pairs["planted"])),
        *([("against the others", _outcome(pairs["against"]))] if pairs["against"]["n"] else []),
        ("  winner flips with order", _share(pairs["flip_rate"])),
        ("  position bias", f"{_statistic(pairs['position_bias'])} (above 0: for the first)"),
        (),
        ("no verdict in the reply", f"{failures['unscored']} of {failures['asked']} asked"),
        *((model, _usage(usage)) for model, usage in report["usage"].items()),
    ]
    head = (
        f"{counts['n']} answers: {counts['settled_by_exact_match']} settled by exact match, "
        f"{counts['settled_by_judge']} by the judge, {counts['unscored']} unscored"
    )
    lines = [f"{row[0]:<28} {row[1]}" if row else "" for row in rows]
    return "\n".join([head, "", *lines, "", worth(report)])


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _share(share: dict[str, Any]) -> str:
    if not share["n"]:
        return "-"
    low, high = share["interval"]
    return f"{100 * share['rate']:.1f} % of {share['n']} [{100 * low:.0f}-{100 * high:.0f}]"


def _statistic(statistic: dict[str, Any]) -> str:
    value, (low, high) = statistic["value"], statistic["interval"]
    return "-" if math.isnan(value) else f"{value:.2f} [{low:.2f} to {high:.2f}]"


def _kappa(statistic: dict[str, Any]) -> str:
    return f"{_statistic(statistic)} {in_words(statistic['value'])}"


def _called(by_class: dict[str, Any]) -> str:
    said = ", ".join(f"{name} {count}" for name, count in sorted(by_class["said"].items(), key=lambda x: -x[1]))
    return f"{_share(by_class['called_so'])}: {said or 'nothing'}"


def _outcome(outcome: dict[str, Any]) -> str:
    kinds = ("wins", "ties", "losses", "unscored")
    return (
        f"{', '.join(f'{outcome[kind]} {kind}' for kind in kinds)} of {outcome['n']}, score {_share(outcome['score'])}"
    )


def _usage(usage: dict[str, Any]) -> str:
    cost = "" if usage["cost"] is None else f", {usage['cost']:.4f} US dollars"
    return (
        f"{usage['replies']} replies ({usage['kept']} kept from before), {usage['input_tokens']:,} tokens in, "
        f"{usage['output_tokens']:,} out{cost}"
    )
