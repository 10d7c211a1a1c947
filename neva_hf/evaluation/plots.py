"""The pictures of an evaluation: plain arrays in, a PNG and its alt text out.

Every function writes one file, 1600 pixels wide and meant to be shown at 800, and returns a sentence or two that say what
is to be seen in it, made from the same numbers. How they look is in plot_style.py.
"""

from neva_hf.evaluation.plot_bars import method_bars
from neva_hf.evaluation.plot_circle import value_circle
from neva_hf.evaluation.plot_control import control_against_damage
from neva_hf.evaluation.plot_dose import dose_curves
from neva_hf.evaluation.plot_matrix import leakage_matrix
from neva_hf.evaluation.plot_methods import MEASURES, Measure, MethodPoint

__all__ = [
    "MEASURES",
    "Measure",
    "MethodPoint",
    "control_against_damage",
    "dose_curves",
    "leakage_matrix",
    "method_bars",
    "value_circle",
]
