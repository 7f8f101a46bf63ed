"""Diagnostics: the doctor before a run, statistics and watched modules while it runs."""

from diffbuf_lib.diagnostics.doctor import examine, examine_paths
from diffbuf_lib.diagnostics.findings import Finding, has_error
from diffbuf_lib.diagnostics.statistics import score_statistics
from diffbuf_lib.diagnostics.watch import gradient_statistics, watch_modules

__all__ = [
    "Finding",
    "examine",
    "examine_paths",
    "gradient_statistics",
    "has_error",
    "score_statistics",
    "watch_modules",
]
