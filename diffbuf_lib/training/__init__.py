"""Training: `train`, a generator of steps; checkpoints that survive a crash; and scores."""

from diffbuf_lib.training.folder import load_checkpoint, load_weights, save_checkpoint, saved_step
from diffbuf_lib.training.metrics import mean_scores, score_clips
from diffbuf_lib.training.run import train
from diffbuf_lib.training.step import StepRecord

__all__ = [
    "StepRecord",
    "load_checkpoint",
    "load_weights",
    "mean_scores",
    "save_checkpoint",
    "saved_step",
    "score_clips",
    "train",
]
