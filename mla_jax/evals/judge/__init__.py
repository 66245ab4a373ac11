"""A language model as judge of answers, on Inspect (inspect_ai), and the judge's own error beside what it says.

verdicts    the six classes, and the prompts that ask for them
items       answers to judge: results of an evaluation, or a JSONL file
planted     answers whose class is known, to measure the judge with
scorers     Inspect scorers: exact match, a judge or several, pairwise in both orders
session     the endpoints asked through Inspect: cache, retries, usage, errors
questions   which answers are asked about, and for which measure
measure     asks all of them
report      kappa, calibration, biases and costs, from what was replied
text        the report as text
run         all of it, from a config to OUT
"""
