"""What can make scenarios dishonest: replies that tell their value by length, style or a name, and texts that recur.

`lint_scenarios` looks at anyone's scenarios and warns. The other functions look for one thing each; the tests run them on
the shipped scenarios. `near_duplicates` needs scikit-learn (`pip install "neva-hf[scenarios]"`), which is imported on its
first use. How much style tells is measured in style.py.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from neva_hf.errors import NeVAError

from .loader import Scenario, scenario_values

# Where a text stands: the id of its scenario (`#3` for the third, when it has none) and its key in `replies`, or `""` for
# the question.
Place = tuple[str, str]

_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_NEGATION = re.compile(
    r"\b(?:no|not|nor|never|neither|none|nobody|nothing|nowhere|cannot|[a-z]+n't|without|instead|rather than|unless|despite"
    r"|avoid(?:s|ed|ing)?|den(?:y|ies|ied|ying)|forget(?:s|ting)?|ignor(?:e|es|ed|ing)|refus(?:e|es|ed|ing|al)"
    r"|reject(?:s|ed|ing|ion)?|skip(?:s|ped|ping)?|stop(?:s|ped)?)\b",
    re.IGNORECASE,
)
_SUFFIX = re.compile(r"(?:ion|ism|ence|ance|ity|e?ment|ness|e)\Z")


@dataclass(frozen=True)
class Finding:
    """Something about scenarios that may mislead whoever measures values with them.

    Args:
        rule (`str`): `"length"`, `"name"`, `"negation"`, `"phrase"`, `"duplicate"`, `"missing"` or `"few"`.
        scenario (`str`): The id of the scenario, `#3` for the third when it has none, `""` for all together.
        value (`str`): The key of the reply, or `""` for the question or the whole scenario.
        message (`str`): What was found, in words.

    Example:

    ```py
    >>> from neva_hf.scenarios.lint import Finding
    >>> print(Finding("negation", "work-advice", "security", "says 'never'"))
    work-advice, security: says 'never' [negation]
    ```
    """

    rule: str
    scenario: str
    value: str
    message: str

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.scenario, self.value) if part)
        return f"{where}: {self.message} [{self.rule}]" if where else f"{self.message} [{self.rule}]"


def lint_scenarios(
    scenarios: Sequence[Scenario],
    *,
    values: Sequence[str] | None = None,
    length_ratio: float = 1.2,
    min_replies: int = 10,
    phrase_words: int = 5,
    phrase_replies: int = 2,
    similarity: float | None = 0.7,
) -> list[Finding]:
    """Looks for what can make scenarios dishonest. All of it is a warning: the scenarios can be used as they are.

    Args:
        scenarios (`Sequence[Scenario]`): Best all splits together, so that texts that recur between them are found.
        values (`Sequence[str]`, *optional*):
            The keys that every scenario should have a reply for. By default all that occur anywhere.
        length_ratio (`float`): How many times the words of the shortest reply of a scenario the longest may have.
        min_replies (`int`): How many replies each value should have in all.
        phrase_words (`int`): How many words make a phrase.
        phrase_replies (`int`): In how many replies a phrase may stand.
        similarity (`float`, *optional*):
            How alike two texts may be ([`near_duplicates`]). `None` does not look, and needs no scikit-learn.

    Returns:
        `list[Finding]`: Rule by rule, in the order of the scenarios. Empty when all is well.

    Raises:
        `NeVAError`: If scikit-learn is missing and `similarity` is not `None`.

    Example:

    ```py
    >>> from neva_hf.scenarios import Scenario
    >>> from neva_hf.scenarios.lint import lint_scenarios
    >>> mine = Scenario("Where to?", {"stimulation": "Somewhere new.", "security": "Never far."}, id="travel")
    >>> for finding in lint_scenarios([mine], min_replies=1, similarity=None):
    ...     print(finding)
    travel, security: says 'Never' [negation]
    ```
    """
    ids = _ids(scenarios)
    names = list(dict.fromkeys([*scenario_values(scenarios), *(value.removeprefix("-") for value in values or ())]))
    replies = [(place, text) for place, text in _texts(scenarios) if place[1]]
    keys = list(values) if values is not None else list(dict.fromkeys(value for (_, value), _ in replies))
    found: list[Finding] = []
    for name, scenario in zip(ids, scenarios, strict=True):
        counts = {value: len(words(text)) for value, text in scenario.replies.items()}
        longest, shortest = max(counts, key=lambda value: counts[value]), min(counts, key=lambda value: counts[value])
        if counts[longest] > length_ratio * counts[shortest]:
            message = f"has {counts[longest]} words, and the reply of {shortest} {counts[shortest]}"
            found.append(Finding("length", name, longest, message))
    for (name, value), text in replies:
        found += [Finding("name", name, value, f"names the value {one}") for one in named_values(text, names)]
    for (name, value), text in replies:
        found += [Finding("negation", name, value, f"says {one!r}") for one in negations(text)]
    for phrase, places in repeated_phrases(scenarios, phrase_words, phrase_replies).items():
        found.append(Finding("phrase", *places[0], f"{phrase!r} stands in {len(places)} replies"))
    if similarity is not None:
        for alike, one, other in near_duplicates(scenarios, similarity=similarity):
            there = ", ".join(part for part in other if part)
            found.append(Finding("duplicate", *one, f"is like {there} (similarity {alike:.2f})"))
    for name, scenario in zip(ids, scenarios, strict=True):
        found += [Finding("missing", name, key, "has no reply") for key in keys if key not in scenario.replies]
    for key in keys:
        number = sum(key in scenario.replies for scenario in scenarios)
        if number < min_replies:
            found.append(Finding("few", "", key, f"has {number} replies in all, fewer than {min_replies}"))
    return found


# One text


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits, joined by hyphens and apostrophes.

    Example:

    ```py
    >>> from neva_hf.scenarios.lint import words
    >>> words("Don't wait: a well-lit room.")
    ["don't", 'wait', 'a', 'well-lit', 'room']
    ```
    """
    return _WORD.findall(plain(text).lower())


def negations(text: str) -> list[str]:
    """The words of a text that negate or deny ("not", "nobody", "isn't", "without", "rather than", "refuses", ...).

    Words that negate by a prefix or only nearly ("unusual", "hardly", "lack") are not among them.
    """
    return _NEGATION.findall(plain(text))


def named_values(text: str, values: Iterable[str]) -> list[str]:
    """Which values a text calls by their names, in any inflection.

    Args:
        text (`str`): A reply.
        values (`Iterable[str]`): Names such as `self_direction`; `-v` counts as `v`.

    Returns:
        `list[str]`: Those that are named, without repeats.

    Example:

    ```py
    >>> from neva_hf.scenarios.lint import named_values
    >>> named_values("A secure, self-directed life.", ["self_direction", "power", "security"])
    ['self_direction', 'security']
    ```
    """
    straight = plain(text)
    names = dict.fromkeys(value.removeprefix("-") for value in values)
    return [name for name in names if _name_pattern(name).search(straight)]


# Many texts


def repeated_phrases(scenarios: Sequence[Scenario], length: int = 5, most: int = 2) -> dict[str, list[Place]]:
    """Runs of `length` words that stand in more than `most` replies.

    Returns:
        `dict[str, list[Place]]`: Phrase -> where it stands, most frequent first.
    """
    found = {phrase: places for phrase, places in _phrases(scenarios, length, False).items() if len(places) > most}
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def shared_phrases(
    one: Sequence[Scenario], other: Sequence[Scenario], length: int, *, questions: bool = True
) -> dict[str, tuple[Place, Place]]:
    """Runs of `length` words that stand in both of two splits.

    Args:
        one (`Sequence[Scenario]`): Such as the test split.
        other (`Sequence[Scenario]`): Such as the training split.
        length (`int`): How many words in a row.
        questions (`bool`): Whether the questions of `one` count too; those of `other` always do.

    Returns:
        `dict[str, tuple[Place, Place]]`: Phrase -> its first place in `one` and in `other`.
    """
    first, second = _phrases(one, length, questions), _phrases(other, length, True)
    return {phrase: (places[0], second[phrase][0]) for phrase, places in first.items() if phrase in second}


def near_duplicates(
    scenarios: Sequence[Scenario], others: Sequence[Scenario] | None = None, *, similarity: float = 0.7
) -> list[tuple[float, Place, Place]]:
    """Questions and replies that are nearly the same.

    Args:
        scenarios (`Sequence[Scenario]`): Whose texts to compare with each other, or with those of `others`.
        others (`Sequence[Scenario]`, *optional*): Another split.
        similarity (`float`):
            The cosine of TF-IDF vectors of runs of 3 to 5 characters from which on two texts are listed. One changed word
            in a text of twenty-five leaves it at 0.86 or more, three at 0.7; texts on one theme have up to 0.5.

    Returns:
        `list[tuple[float, Place, Place]]`: Similarity (1.0 for the same text) and the two places, the most similar first.

    Raises:
        `NeVAError`: If scikit-learn is missing.
    """
    vectorizer = sklearn_module("feature_extraction.text").TfidfVectorizer(
        analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True
    )
    left, right = _texts(scenarios), _texts(others or [])
    if not left:
        return []
    vectors = vectorizer.fit_transform([plain(text) for _, text in [*left, *right]])
    start, block = (0 if others is None else len(left)), 256
    found: list[tuple[float, Place, Place]] = []
    for top in range(0, len(left), block):
        rows = vectors[top : min(top + block, len(left))]
        cosines = (rows @ vectors[start:].T).tocoo()
        alike = cosines.data >= similarity
        for row, column, cosine in zip(cosines.row[alike], cosines.col[alike], cosines.data[alike], strict=True):
            if others is not None or column > top + row:
                there = left[column] if others is None else right[column]
                found.append((min(float(cosine), 1.0), left[top + row][0], there[0]))
    return sorted(found, key=lambda pair: -pair[0])


# Helpers


def plain(text: str) -> str:
    """With straight apostrophes, so that words are found whichever ones somebody types."""
    return text.replace("’", "'").replace("ʼ", "'")


@functools.lru_cache(maxsize=1024)
def _name_pattern(name: str) -> re.Pattern[str]:
    """Matches the name and its first parts (`security` of `security_personal`), all but the shortest in any inflection."""
    parts = name.split("_")
    heads = [parts[:count] for count in range(1, len(parts)) if len("".join(parts[:count])) >= 5]
    patterns = [r"[-_ ]?".join([*head[:-1], _stem(head[-1])]) for head in (*heads, parts)]
    return re.compile(rf"\b(?:{'|'.join(patterns)})\b", re.IGNORECASE)


def _stem(word: str) -> str:
    """As a pattern: `secur\\w*` of `security`. A word of few letters stands for itself only."""
    stem = _SUFFIX.sub("", word)
    stem = stem if len(stem) >= 5 else word
    return rf"{stem}\w*" if len(stem) >= 5 else stem


def _ids(scenarios: Sequence[Scenario]) -> list[str]:
    return [scenario.id or f"#{number}" for number, scenario in enumerate(scenarios, start=1)]


def _texts(scenarios: Sequence[Scenario]) -> list[tuple[Place, str]]:
    """Every question, with `""` for a value, and every reply, with their places."""
    return [
        ((name, value), text)
        for name, scenario in zip(_ids(scenarios), scenarios, strict=True)
        for value, text in (("", scenario.question), *scenario.replies.items())
    ]


def _phrases(scenarios: Sequence[Scenario], length: int, questions: bool) -> dict[str, list[Place]]:
    """Each run of `length` words -> where it stands; a text that repeats it counts once."""
    found: dict[str, list[Place]] = defaultdict(list)
    for place, text in _texts(scenarios):
        if place[1] or questions:
            run = words(text)
            runs = (" ".join(run[start : start + length]) for start in range(len(run) - length + 1))
            for phrase in dict.fromkeys(runs):
                found[phrase].append(place)
    return found


def sklearn_module(module: str) -> Any:
    """A module of scikit-learn, or an error that says what to install."""
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise NeVAError(
            "Measuring style and near-duplicates of scenarios needs scikit-learn, which is not installed: "
            '`pip install "neva-hf[scenarios]"`. `lint_scenarios(..., similarity=None)` does without.'
        ) from error
