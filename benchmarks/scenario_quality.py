"""How honest the shipped scenarios are: what blind labelling found, and what style alone gives away.

    pip install scikit-learn && python benchmarks/scenario_quality.py

Writes benchmarks/results/scenario_quality.md. The labels are in benchmarks/results/blind_labels.json: for each reply that
was shown, `[split, scenario, value, label]`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from neva_hf import load_scenarios
from neva_hf.scenarios import scenario_values

RESULTS = Path(__file__).parent / "results"

# Words that build sentences rather than say something, without pronouns and with the marks of punctuation.
FUNCTION_WORDS = (
    "a an the and or but so if then than that this these those of in on at by to for with from into as is are was were be "
    "been being am do does did has have had will would can could should may might must shall when where how there here"
)


def style(text: str) -> str:
    """The text with every word that is no function word replaced by the same letter."""
    kept = {*FUNCTION_WORDS.split(), ".", ","}
    return " ".join(word if word in kept else "x" for word in re.findall(r"[a-z']+|[.,]", text.lower()))


def replies(split: str) -> tuple[list[str], list[str]]:
    pairs = [(reply, value) for one in load_scenarios("schwartz", split) for value, reply in one.replies.items()]
    return [reply for reply, _ in pairs], [value for _, value in pairs]


def main() -> None:
    values = scenario_values(load_scenarios("schwartz", "train"))
    labels = json.loads((RESULTS / "blind_labels.json").read_text())
    confusion = Counter((value, label) for _, _, value, label in labels)
    right = sum(count for (value, label), count in confusion.items() if value == label)
    lines = [
        "# Quality of the scenarios",
        "",
        f"Blind labelling: {right} of {len(labels)} replies got the value that they were written for. Rows: written for;",
        "columns: labelled as.",
        "",
        "| | " + " | ".join(values) + " |",
        "|---|" + "---:|" * len(values),
        *(f"| {value} | {' | '.join(str(confusion[value, one]) for one in values)} |" for value in values),
        "",
        "What style alone gives away: accuracy of a logistic regression on function words and commas, trained on train",
        "(chance is 0.10).",
        "",
        "| features | dev | test |",
        "|---|---:|---:|",
    ]
    texts, wanted = replies("train")
    for name, prepare in (("function words and punctuation", style), ("number of words and commas", None)):
        scores = []
        for split in ("dev", "test"):
            unseen, truth = replies(split)
            if prepare is None:
                found = [[len(text.split()), text.count(",")] for text in texts]
                shown = [[len(text.split()), text.count(",")] for text in unseen]
            else:
                counter = CountVectorizer(token_pattern=r"[^ ]+")
                found = counter.fit_transform([prepare(text) for text in texts])
                shown = counter.transform([prepare(text) for text in unseen])
            scores.append(LogisticRegression(C=0.1, max_iter=2000).fit(found, wanted).score(shown, truth))
        lines.append(f"| {name} | " + " | ".join(f"{score:.2f}" for score in scores) + " |")
    (RESULTS / "scenario_quality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
