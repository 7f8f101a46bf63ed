"""Judge models: scores of clips, baselines beside them, intervals, comparisons, sweeps."""

from diffbuf_lib.evaluation.bootstrap import compare_folders
from diffbuf_lib.evaluation.evaluate import Job, evaluate, evaluate_folder, evaluate_part
from diffbuf_lib.evaluation.scores import ScoredClip

__all__ = [
    "Job",
    "ScoredClip",
    "compare_folders",
    "evaluate",
    "evaluate_folder",
    "evaluate_part",
]
