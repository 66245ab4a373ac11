"""Evaluations by generation, with the number of prompts and an interval beside every accuracy.

task        what an evaluation asks, and how answers are scored
passkey     the task of passkey retrieval
runner      asks a model, cell by cell, and writes the results
answers     what a model answered, as results keep it
results     RUN/eval/TASK.json: written, read, checked
report      table and heatmap
html_report RUN/eval/report.html, from report.html.jinja
sweep       the runs of a sweep compared
stats       intervals
agreement   Cohen's kappa, bootstrap intervals
judge/      a language model judges the answers, and is judged itself
provenance  command, commit, hardware and versions of a measurement
"""
