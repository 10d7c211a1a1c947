"""How much of the value of a reply is told by style alone: by small words and punctuation, or by what can be counted.

All but `counts` and `mean_counts` need scikit-learn (`pip install "neva-hf[scenarios]"`), which is imported on their
first use. The tests run them on the shipped scenarios.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from .lint import negations, plain, sklearn_module, words
from .loader import Scenario

COUNTS = ("words", "characters", "commas", "full stops", "negation words")

_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[^\w\s]")
# What ENGLISH_STOP_WORDS of scikit-learn lacks: contractions, and a few more words that carry style.
_CONTRACTION = re.compile(
    r"(?:i|you|he|she|it|we|they|that|there|here|what|who|how|where|let)'(?:m|d|ll|re|s|ve)|[a-z]+n't"
)
_STYLE_WORDS = "any both did does each few just so some such sure than too yeah yes"


def counts(text: str) -> tuple[int, ...]:
    """What can be counted without reading: words, characters, commas, full stops, negation words (`COUNTS`)."""
    return (len(words(text)), len(text), text.count(","), text.count("."), len(negations(text)))


def mask_content(text: str) -> str:
    """A text of which only the style is left: each content word and number becomes `x`.

    Kept are the words of scikit-learn's `ENGLISH_STOP_WORDS`, contractions, and marks of punctuation.

    Returns:
        `str`: Lower case, with spaces between all words and marks.

    Raises:
        `NeVAError`: If scikit-learn is missing.

    Example:

    ```py
    >>> from neva_hf.scenarios.style import mask_content
    >>> mask_content("Choose the river, since it's free.")
    "x the x , since it's x ."
    ```
    """
    kept = sklearn_module("feature_extraction.text").ENGLISH_STOP_WORDS.union(_STYLE_WORDS.split())
    tokens = _TOKEN.findall(plain(text).lower())
    return " ".join(
        token if token in kept or not token[0].isalnum() or _CONTRACTION.fullmatch(token) else "x" for token in tokens
    )


def mean_counts(scenarios: Sequence[Scenario]) -> dict[str, dict[str, float]]:
    """The mean of each of `COUNTS` over the replies of each value.

    Returns:
        `dict[str, dict[str, float]]`: Key of `replies` -> name of the count -> mean.
    """
    rows: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for scenario in scenarios:
        for value, text in scenario.replies.items():
            rows[value].append(counts(text))
    return {
        value: {name: sum(column) / len(column) for name, column in zip(COUNTS, zip(*found, strict=True), strict=True)}
        for value, found in rows.items()
    }


def count_accuracy(train: Sequence[Scenario], unseen: Sequence[Scenario], *, relative: bool = False) -> float:
    """How often the counts of a reply (`COUNTS`) tell its value: of ten values, chance is 0.10.

    Args:
        train (`Sequence[Scenario]`): What a logistic regression on the standardized counts learns from.
        unseen (`Sequence[Scenario]`): What it is tried on.
        relative (`bool`): Counts less their mean over the replies of the scenario.

    Returns:
        `float`: The share of the unseen replies whose value it names.

    Raises:
        `NeVAError`: If scikit-learn is missing.
    """
    linear, pipeline, scaling = (sklearn_module(name) for name in ("linear_model", "pipeline", "preprocessing"))

    def features(scenarios: Sequence[Scenario]) -> list[list[float]]:
        rows: list[list[float]] = []
        for scenario in scenarios:
            found = [counts(text) for text in scenario.replies.values()]
            means = [sum(column) / len(column) if relative else 0.0 for column in zip(*found, strict=True)]
            rows += [[count - mean for count, mean in zip(row, means, strict=True)] for row in found]
        return rows

    model = pipeline.make_pipeline(scaling.StandardScaler(), linear.LogisticRegression(max_iter=2000))
    return float(model.fit(features(train), _labels(train)).score(features(unseen), _labels(unseen)))


def style_accuracy(train: Sequence[Scenario], unseen: Sequence[Scenario], C: float = 0.1) -> float:
    """How often style alone ([`mask_content`]) tells the value of a reply: of ten values, chance is 0.10.

    Args:
        train (`Sequence[Scenario]`): What a logistic regression on the bag of style words learns from.
        unseen (`Sequence[Scenario]`): What it is tried on.
        C (`float`): How freely it may fit, as in scikit-learn.

    Returns:
        `float`: The share of the unseen replies whose value it names.

    Raises:
        `NeVAError`: If scikit-learn is missing.
    """
    text, linear = sklearn_module("feature_extraction.text"), sklearn_module("linear_model")
    bag = text.CountVectorizer(token_pattern=r"[^ ]+")
    seen, new = (
        [mask_content(reply) for scenario in scenarios for reply in scenario.replies.values()]
        for scenarios in (train, unseen)
    )
    model = linear.LogisticRegression(C=C, max_iter=2000).fit(bag.fit_transform(seen), _labels(train))
    return float(model.score(bag.transform(new), _labels(unseen)))


def _labels(scenarios: Sequence[Scenario]) -> list[str]:
    return [value for scenario in scenarios for value in scenario.replies]
