"""Judge models: scores of clips, baselines, confidence intervals, comparisons, sweeps."""

from diffbuf_lib.evaluation.bootstrap import compare_folders
from diffbuf_lib.evaluation.evaluate import evaluate, evaluate_folder, evaluate_part
from diffbuf_lib.evaluation.scores import ScoredClip
from diffbuf_lib.options import Job

__all__ = [
    "Job",
    "ScoredClip",
    "compare_folders",
    "evaluate",
    "evaluate_folder",
    "evaluate_part",
]
