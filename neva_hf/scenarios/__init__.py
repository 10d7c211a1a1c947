"""Contrastive scenarios: a question with several replies, each living by another value. And neutral text."""

from .lint import Finding, lint_scenarios
from .loader import (
    NEUTRAL_SPLITS,
    SCENARIO_SETS,
    SPLITS,
    Scenario,
    load_neutral_texts,
    load_scenarios,
    scenario_values,
    scenarios_hash,
)

__all__ = [
    "NEUTRAL_SPLITS",
    "SCENARIO_SETS",
    "SPLITS",
    "Finding",
    "Scenario",
    "lint_scenarios",
    "load_neutral_texts",
    "load_scenarios",
    "scenario_values",
    "scenarios_hash",
]
