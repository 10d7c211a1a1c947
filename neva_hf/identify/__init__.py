"""From scenarios to a neuron map: collect, score, select, calibrate."""

from .balance import balanced_edits, balanced_neurons, balanced_scores, candidates
from .calibrate import TARGET_KL, Calibration, calibrate
from .collect import collect
from .dose import Expected, dose_curves, expected
from .gate import train_gates
from .pipeline import identify_neurons
from .probe import value_probes, with_logits_per_unit
from .replies import ReplySamples, reply_samples
from .score import SCORES, Scored, attribution
from .select import build_map, middle_layers, top_neurons
from .sensitivity import fisher_samples
from .statistics import Statistics

__all__ = [
    "SCORES",
    "TARGET_KL",
    "Calibration",
    "Expected",
    "ReplySamples",
    "Scored",
    "Statistics",
    "attribution",
    "balanced_edits",
    "balanced_neurons",
    "balanced_scores",
    "build_map",
    "calibrate",
    "candidates",
    "collect",
    "dose_curves",
    "expected",
    "fisher_samples",
    "identify_neurons",
    "middle_layers",
    "reply_samples",
    "top_neurons",
    "train_gates",
    "value_probes",
    "with_logits_per_unit",
]
