"""How honest the shipped scenarios are: what blind labelling found, what style alone gives away, and what recurs.

    pip install "neva-hf[scenarios]" && python benchmarks/scenario_quality.py

Writes benchmarks/results/scenario_quality.md, and its table of measures into the dataset card
(neva_hf/scenarios/README.md, between two comments). The labels are in benchmarks/results/blind_labels.json: for each reply
that was shown, `[split, scenario, value, label]`. If there is benchmarks/results/naturalness.json, with rows `[split,
scenario, value, rating from 1 to 5]` of a reader who rated the English, the mean ratings are reported too.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import neva_hf.scenarios
from neva_hf import Scenario, load_scenarios
from neva_hf.scenarios import SPLITS, lint, scenario_values, style

RESULTS = Path(__file__).parent / "results"
CARD = Path(neva_hf.scenarios.__file__).parent / "README.md"
START, END = "<!-- measures: written by benchmarks/scenario_quality.py -->", "<!-- end of measures -->"


def read_judgements(name: str, scenarios: dict[str, list[Scenario]]) -> list[tuple[str, str, str, Any]]:
    """Rows `[split, scenario, value, judgement]`, all of which must be of replies that exist."""
    file = RESULTS / name
    rows = [tuple(row) for row in json.loads(file.read_text())] if file.is_file() else []
    there = {(split, one.id, value) for split, found in scenarios.items() for one in found for value in one.replies}
    if unknown := [row for row in rows if row[:3] not in there]:
        raise SystemExit(f"{name} judges a reply that does not exist: {unknown[0]}")
    return rows


def style_overlap(scenarios: list[Scenario]) -> float:
    """How many style words and marks two replies to one question have in common: intersection by union, mean."""
    shares = []
    for scenario in scenarios:
        bags = [Counter(style.mask_content(reply).split()) for reply in scenario.replies.values()]
        for bag in bags:
            del bag["x"]
        shares += [(one & other).total() / (one | other).total() for one, other in itertools.combinations(bags, 2)]
    return mean(shares)


def spread(scenarios: list[Scenario], count: str) -> float:
    """How much larger the mean of a count is for the value with most than for the one with least."""
    means = [found[count] for found in style.mean_counts(scenarios).values()]
    return max(means) / min(means) - 1


def longest_shared(one: list[Scenario], other: list[Scenario], questions: bool) -> tuple[int, str]:
    """The longest run of words that two splits share, and an example."""
    length, example = 0, ""
    while shared := lint.shared_phrases(one, other, length + 1, questions=questions):
        length, example = length + 1, min(shared)
    return length, example


def nearest(one: list[Scenario], other: list[Scenario]) -> float:
    return max(alike for alike, _, _ in lint.near_duplicates(one, other, similarity=0.2))


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        "|---|" + "---:|" * (len(head) - 1),
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in rows),
    ]


def main() -> None:
    found = {split: load_scenarios("schwartz", split) for split in SPLITS}
    train, values = found["train"], scenario_values(found["train"])
    everything = [scenario for split in SPLITS for scenario in found[split]]
    labels = read_judgements("blind_labels.json", found)
    ratings = read_judgements("naturalness.json", found)

    def right(split: str) -> str:
        shown = [row for row in labels if row[0] == split]
        return f"{sum(row[2] == row[3] for row in shown)} of {len(shown)}"

    def rated(split: str) -> str:
        these = [row[3] for row in ratings if row[0] == split]
        return f"{mean(these):.1f} of {len(these)}" if these else "not rated"

    def of_unseen(measure: Any) -> list[str]:
        return ["", *(f"{measure(found[split]):.2f}" for split in SPLITS[1:])]

    def of_all(measure: Any) -> list[str]:
        return [measure(found[split]) for split in SPLITS]

    measures = table(
        ["", *SPLITS],
        [
            ["replies", *of_all(lambda some: sum(len(one.replies) for one in some))],
            ["blind labels that are right", *(right(split) for split in SPLITS)],
            *([["naturalness of the English, 1 to 5", *(rated(split) for split in SPLITS)]] if ratings else []),
            *(
                [
                    f"value told from style words, C = {C}",
                    *of_unseen(lambda some, C=C: style.style_accuracy(train, some, C)),
                ]
                for C in (0.01, 0.1, 1)
            ),
            ["the same learnt from dev, C = 0.1", "", "", f"{style.style_accuracy(found['dev'], found['test']):.2f}"],
            ["value told from counts", *of_unseen(lambda some: style.count_accuracy(train, some))],
            [
                "value told from counts less their mean in the scenario",
                *of_unseen(lambda some: style.count_accuracy(train, some, relative=True)),
            ],
            *(
                [
                    f"mean {count}: value with most over value with least",
                    *of_all(lambda some, c=count: f"{spread(some, c):+.1%}"),
                ]
                for count in style.COUNTS[:4]
            ),
            ["style words that two replies to a question share", *of_all(lambda some: f"{style_overlap(some):.2f}")],
            [
                "negation words",
                *of_all(lambda some: sum(len(lint.negations(r)) for s in some for r in s.replies.values())),
            ],
            [
                "longest run of words of a reply that is in train",
                "",
                *(longest_shared(found[split], train, False)[0] for split in SPLITS[1:]),
            ],
            [
                "the same of questions and replies",
                "",
                *(longest_shared(found[split], train, True)[0] for split in SPLITS[1:]),
            ],
            ["highest similarity of a text to one of train", *of_unseen(lambda some: nearest(some, train))],
        ],
    )
    confusion = Counter((row[2], row[3]) for row in labels)
    pairs = lint.near_duplicates(everything, similarity=0.5)
    lines = [
        "# Quality of the scenarios",
        "",
        "The set `schwartz`. Told from style words or counts: accuracy of a logistic regression that learns from train,",
        "where chance is 0.10. Style words: scikit-learn's `ENGLISH_STOP_WORDS`, contractions and punctuation, with every",
        "other word masked. Counts: " + ", ".join(style.COUNTS) + ".",
        "Similarity: cosine of TF-IDF of runs of 3 to 5 characters.",
        "",
        *measures,
        "",
        f"Phrases of five words in more than two replies: {len(lint.repeated_phrases(everything))}.",
        f'Longest run of words that test and train share: "{longest_shared(found["test"], train, True)[1]}".',
        "",
        "Pairs of texts with a similarity of 0.5 or more, all splits together:",
        "",
        *(
            f"- {alike:.2f}: " + " / ".join(f"{scenario}, {value or 'question'}" for scenario, value in places)
            for alike, *places in pairs
        ),
        "",
        f"Blind labels, of which {sum(row[2] == row[3] for row in labels)} of {len(labels)} are right: written for (rows), "
        "labelled as (columns).",
        "",
        *table(["", *values], [[value, *(confusion[value, one] for one in values)] for value in values]),
    ]
    (RESULTS / "scenario_quality.md").write_text("\n".join(lines) + "\n")
    card = CARD.read_text()
    if card.count(START) != 1 or card.count(END) != 1:
        raise SystemExit(f"{CARD} lacks the comments between which the measures go.")
    block = "\n".join([START, "", *measures, "", END])
    CARD.write_text(re.sub(f"{re.escape(START)}.*?{re.escape(END)}", lambda _: block, card, flags=re.DOTALL))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
