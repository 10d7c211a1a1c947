"""What is broken in generated answers: repetition, loops, little variety, empty answers, refusals.

Words, not tokens, are counted, so that models with different vocabularies compare.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .generations import Answer

LONGEST_PERIOD = 40
"""The longest loop that is looked for, in words."""

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# How chat models begin when they decline: an apology or a denial of being able or willing.
_REFUSAL = re.compile(
    r"\A\W*(?:(?:i'm|i am) (?:so |very |really )?sorry|sorry, (?:but )?i|i (?:cannot|can't|can not|won't|will not|am unable"
    r" to|am not able to|must decline)|i'm (?:unable|not able) to|as an ai\b|unfortunately, i (?:cannot|can't|am unable))",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TextDamage:
    """How answers are.

    Args:
        answers (`int`): How many.
        words (`float`): Mean length, in words.
        repeated (`float`): Mean share of repeated 4-grams, see [`repeated_ngrams`].
        collapsed (`float`): Share of answers that end in a loop, see [`collapse`].
        distinct_1 (`float`): Distinct words over all words of all answers.
        distinct_2 (`float`): Distinct pairs of words over all pairs.
        empty (`float`): Share of answers without a word.
        refused (`float`): Share of answers that begin as a refusal does.
        ended (`float`): Share of answers that ended by themselves.
    """

    answers: int
    words: float
    repeated: float
    collapsed: float
    distinct_1: float
    distinct_2: float
    empty: float
    refused: float
    ended: float

    def as_dict(self) -> dict[str, float | int]:
        """As plain data."""
        return asdict(self)


def text_damage(answers: Sequence[Answer]) -> TextDamage:
    """Measures answers, such as those of one setting of the dials.

    Args:
        answers (`Sequence[Answer]`): From [`generate_answers`].

    Returns:
        [`TextDamage`]: Means over answers; NaN without any.
    """
    texts = [words_of(answer.text) for answer in answers]

    def mean(numbers: Sequence[float]) -> float:
        return sum(numbers) / len(numbers) if numbers else float("nan")

    return TextDamage(
        answers=len(answers),
        words=mean([len(words) for words in texts]),
        repeated=mean([repeated_ngrams(words) for words in texts]),
        collapsed=mean([collapse(words) is not None for words in texts]),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        empty=mean([not words for words in texts]),
        refused=mean([is_refusal(answer.text) for answer in answers]),
        ended=mean([answer.ended for answer in answers]),
    )


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return _WORD.findall(text.lower())


def repeated_ngrams(words: Sequence[str], n: int = 4) -> float:
    """The share of repeated n-grams within one answer.

    `1 - |distinct n-grams| / |n-grams|`, seq-rep-n of Welleck et al. 2020, "Neural Text Generation with Unlikelihood
    Training" (arXiv 1908.04319, section 6.1), here over words.

    Args:
        words (`Sequence[str]`): The words of the answer.
        n (`int`): The length of the n-grams.

    Returns:
        `float`: 0 (nothing comes twice) to nearly 1; 0 for answers that are too short.

    Example:

    ```py
    >>> from neva_hf.evaluation.text_damage import repeated_ngrams
    >>> repeated_ngrams("a b a b a b a".split(), n=2)
    0.6666666666666667
    ```
    """
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def collapse(words: Sequence[str], *, least: int = 12, copies: int = 3) -> int | None:
    """Where an answer falls into a loop: the place from which it is periodic up to its end.

    The tail from place s on is a loop of period p if every word from s + p on equals the one p words earlier; it counts if
    it holds the period at least `copies` times and at least `least` words. Of all periods up to `LONGEST_PERIOD` words the
    earliest s is taken.

    Args:
        words (`Sequence[str]`): The words (or tokens) of the answer.
        least (`int`): How long a loop must be.
        copies (`int`): How often its period must come.

    Returns:
        `int` or `None`: The number of words before the loop; `None` if there is no loop.

    Example:

    ```py
    >>> from neva_hf.evaluation.text_damage import collapse
    >>> collapse("so we go on".split() + ["and"] * 20)
    4
    ```
    """
    found = None
    for period in range(1, min(LONGEST_PERIOD, len(words) // copies) + 1):
        start = len(words) - period
        while start > 0 and words[start - 1] == words[start - 1 + period]:
            start -= 1
        length = len(words) - start
        if length >= max(least, copies * period) and (found is None or start < found):
            found = start
    return found


def distinct(texts: Sequence[Sequence[str]], n: int) -> float:
    """Variety over several answers: distinct-n of Li et al. 2016 (arXiv 1510.03055, section 5.4).

    `|distinct n-grams| / |n-grams|`, over all answers together, so answers that are all alike count. It falls with the
    amount of text: compare as many answers of about the same length.

    Args:
        texts (`Sequence[Sequence[str]]`): The words of each answer.
        n (`int`): The length of the n-grams.

    Returns:
        `float`: 0 to 1; NaN without any n-gram.
    """
    grams = [tuple(words[at : at + n]) for words in texts for at in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def is_refusal(text: str) -> bool:
    """Whether an answer begins as refusals do ("I'm sorry, but I", "I cannot", "As an AI"). Rough, and English only."""
    return bool(_REFUSAL.match(text.replace("’", "'")))
