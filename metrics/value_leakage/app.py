"""The Space of this metric: JSON in, JSON out."""

import json
from pathlib import Path

import evaluate
import gradio as gr

metric = evaluate.load(str(Path(__file__).with_name("value_leakage.py")))

EXAMPLE = """{
  "predictions": [
    {"values": ["power", "security", "benevolence"], "before": [-2.0, -2.0, -2.0], "after": [-1.0, -1.5, -2.0]}
  ],
  "references": ["power"]
}"""


def compute(text):
    """The metric of what is given as JSON, with the arguments of `compute`."""
    try:
        return metric.compute(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error)) from error


if __name__ == "__main__":
    gr.Interface(
        compute,
        gr.Code(EXAMPLE, language="json", label="Input"),
        gr.JSON(label="Result"),
        title="Value Leakage",
        description=metric.description,
        article=metric.inputs_description,
        flagging_mode="never",
    ).launch()
