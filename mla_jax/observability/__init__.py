"""Reporting of a run: metrics, goodput, FLOPs, traces, and the trackers they go to."""
