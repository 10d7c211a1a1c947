"""What goes wrong, as a sentence for the page. Nothing that a visitor wrote is logged."""

from __future__ import annotations

import logging
import traceback

import gradio as gr

from neva_hf.errors import NeVAError

logger = logging.getLogger(__name__)


def explain(error: Exception) -> str:
    """A sentence for the visitor; a fault of ours goes to the log by its kind and place, without its message.

    Args:
        error (`Exception`): What was raised.

    Returns:
        `str`: One sentence. It may quote the visitor or a map: escape it.
    """
    if isinstance(error, NeVAError):
        return " ".join(str(error).split())
    if isinstance(error, gr.Error):  # such as ZeroGPU's about quotas
        return str(error.message)
    # A message may hold the visitor's words; where it was raised does not.
    where = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s in the page:\n%s", type(error).__name__, where)
    return "Something went wrong here that is not your fault. Try again, or reload the page."


def refused(error: Exception) -> gr.Error:
    """The same for those who call the API: an error that Gradio passes on and does not log."""
    return gr.Error(explain(error), print_exception=False)
