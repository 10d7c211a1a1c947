"""From scenarios to a neuron map: collect, score, select, calibrate."""

from .balance import balanced_scores, balanced_shifts
from .calibrate import TARGET_KL, Calibration, calibrate
from .collect import collect
from .pipeline import identify_neurons
from .score import SCORES, Scored, attribution
from .select import build_map, middle_layers, top_neurons
from .sensitivity import fisher_samples
from .statistics import Statistics

__all__ = [
    "SCORES",
    "TARGET_KL",
    "Calibration",
    "Scored",
    "Statistics",
    "attribution",
    "balanced_scores",
    "balanced_shifts",
    "build_map",
    "calibrate",
    "collect",
    "fisher_samples",
    "identify_neurons",
    "middle_layers",
    "top_neurons",
]
