"""Judge models: scores of clips, baselines beside them, intervals, comparisons, sweeps.

`evaluate` and `summary` score a model in memory, for a notebook or the demo. What `diffbuf
evaluate` calls is `runner.evaluate_folder`: parallel, resumable, with baselines, CSV, JSON and a
page; the results folder is described in `results`. `comparison` is `diffbuf compare`, `sweep` is
`diffbuf sweep`.
"""

from diffbuf_lib.evaluation.in_memory import MeanGain, ScoredClip, evaluate, summary

__all__ = ["MeanGain", "ScoredClip", "evaluate", "summary"]
