"""Neuron maps at fixed strengths, for programs that do not know neva-hf: PEFT alone, transformers, vLLM, llama.cpp."""

from .check import CHECK_PROMPTS, Check
from .gguf import export_gguf
from .merge import export_merged
from .result import Export
from .stock import export_stock

__all__ = ["CHECK_PROMPTS", "Check", "Export", "export_gguf", "export_merged", "export_stock"]
