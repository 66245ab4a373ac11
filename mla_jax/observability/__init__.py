"""What a run reports: metrics, goodput, FLOPs, traces, and the trackers they go to."""
