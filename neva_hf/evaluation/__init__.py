"""Control, leakage and damage of whatever steers a model, and reports of them."""

from .candidate import Candidate, Extra
from .compare import baseline_candidates, baseline_names, compare, map_candidate
from .job import Job, run_job
from .report import read_report, write_report
from .run import Run, evaluate

__all__ = [
    "Candidate",
    "Extra",
    "Job",
    "Run",
    "baseline_candidates",
    "baseline_names",
    "compare",
    "evaluate",
    "map_candidate",
    "read_report",
    "run_job",
    "write_report",
]
