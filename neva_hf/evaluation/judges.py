"""The judges of the control success rate, by name.

`choice` needs no other model and no text: it compares log-probabilities of replies. The others read answers that the
model generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from neva_hf.errors import NeVAError

from .llm_judge import LLMJudge
from .text_judge import TextJudge
from .verdicts import Judge


@dataclass(frozen=True)
class JudgeKind:
    """A judge that can be chosen.

    Args:
        label (`str`): What it does, in one line.
        make (`Callable[..., Judge]`, *optional*): Makes it from its options; `None` where no text is judged.
    """

    label: str
    make: Callable[..., Judge] | None = None

    @property
    def reads_answers(self) -> bool:
        """Whether the model has to generate answers for it."""
        return self.make is not None


JUDGES: Mapping[str, JudgeKind] = {
    "choice": JudgeKind("which of two replies the model finds likelier"),
    "llm": JudgeKind("a judge model says whether an answer prioritizes the value", LLMJudge.from_options),
    "text": JudgeKind("a text classifier names the value of an answer; no other model needed", TextJudge.from_options),
}


def make_judge(name: str, **options: Any) -> Judge:
    """Makes a judge of generated answers.

    Args:
        name (`str`): `"llm"` or `"text"`.
        options (`Any`): See [`LLMJudge.from_options`] and [`TextJudge.from_options`].

    Returns:
        `Judge`: Takes [`Item`]s, gives [`Verdicts`].

    Raises:
        `NeVAError`: For an unknown name, for `choice`, which judges no text, and for options that the judge does not have.
    """
    if name not in JUDGES:
        raise NeVAError(f"There is no judge {name!r}: choose among {list(JUDGES)}.")
    make = JUDGES[name].make
    if make is None:
        raise NeVAError(f"The judge {name!r} reads no answers ({JUDGES[name].label}): its rate comes with the tables.")
    try:
        return make(**options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise NeVAError(f"The judge {name!r} has no such option: {error}.") from error
