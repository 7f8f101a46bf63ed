"""Judge models: scores of clips, baselines beside them, intervals, comparisons, sweeps.

`evaluate` and `summary` score a model in memory, for a notebook or the demo; `evaluate_folder` is
`diffbuf evaluate`, `results.compare_folders` is `diffbuf compare`, `sweep` is `diffbuf sweep`.
"""

from diffbuf_lib.evaluation.evaluate import MeanGain, ScoredClip, evaluate, summary
from diffbuf_lib.evaluation.runner import Job, evaluate_folder

__all__ = ["Job", "MeanGain", "ScoredClip", "evaluate", "evaluate_folder", "summary"]
