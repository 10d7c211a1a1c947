"""Control success rate: how often a model prefers a value's reply over its rivals, before and after it was steered."""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Control success rate (CSR): the share of choices between a value's reply and another value's reply to the same question
that the value's reply wins, before and after a model was steered towards the value, with bootstrap 95% intervals.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list` of `dict`): One per question and target value:
        - values (`list` of `str`): The values whose replies were compared. A key `-v` marks a reply that opposes v.
        - before (`list` of `float`): How much the model preferred each reply before: its log-probability, nats per token.
        - after (`list` of `float`): The same after steering towards the target.
        Where a judge read generated answers instead, `values` holds the target alone, and `before` and `after` hold 1 (the
        answer prioritizes the value) or 0.
    references (`list` of `str`): The target value of each prediction.
    question_ids (`list`, optional): Which question each prediction is about. Bootstrap samples draw questions; without it
        every prediction counts as a question of its own.
    sign (`int`): 1, or -1 where the model was steered away from the targets: a fall then counts as the change wanted.
    draws (`int`): Bootstrap samples.
    seed (`int`): Of the samples.
Returns:
    control_success_rate (`float`): The rate after steering, 0 to 1; the mean over target values.
    before (`float`): The rate before.
    change (`float`): What steering changed, the way that was wanted.
    control_success_rate_interval, before_interval, change_interval (`list` of `float`): Their 95% intervals.
    values (`dict`): Target value -> `before`, `control_success_rate`, `change`, `choices` (how many there were).
Examples:
    >>> metric = evaluate.load("control_success_rate")
    >>> found = metric.compute(
    ...     predictions=[{"values": ["power", "security", "tradition"], "before": [-2.0, -1.0, -3.0],
    ...                   "after": [-1.0, -1.5, -3.0]}],
    ...     references=["power"],
    ... )
    >>> found["before"], found["control_success_rate"], found["change"]
    (0.5, 1.0, 0.5)
"""

_CITATION = ""


class ControlSuccessRate(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": {
                        "values": datasets.Sequence(datasets.Value("string")),
                        "before": datasets.Sequence(datasets.Value("float64")),
                        "after": datasets.Sequence(datasets.Value("float64")),
                    },
                    "references": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references, question_ids=None, sign=1, draws=2000, seed=0):
        if sign not in (1, -1):
            raise ValueError(f"`sign` must be 1 or -1, got {sign!r}.")
        if question_ids is None:
            question_ids = range(len(predictions))
        if len(question_ids) != len(predictions):
            raise ValueError(f"{len(question_ids)} `question_ids` were given for {len(predictions)} predictions.")
        check_targets(predictions, references)
        questions = {one: place for place, one in enumerate(dict.fromkeys(question_ids))}
        targets = {one: place for place, one in enumerate(dict.fromkeys(references))}
        # Choices, and how many of them are won before and after, by question and target.
        faced, before, after = (np.zeros((len(questions), len(targets))) for _ in range(3))
        for question, prediction, target in zip(question_ids, predictions, references, strict=True):
            here = questions[question], targets[target]
            count, won, won_now = wins(prediction, target)
            faced[here] += count
            before[here] += won
            after[here] += won_now
        weights = bootstrap_weights(len(questions), draws, seed)
        choices = weights @ faced
        with np.errstate(invalid="ignore", divide="ignore"):
            rates = {
                "control_success_rate": weights @ after / choices,
                "before": weights @ before / choices,
                "change": sign * (weights @ (after - before)) / choices,
            }
        result = {}
        for name, rate in rates.items():
            result[name] = float(rate[0].mean())
            result[f"{name}_interval"] = interval(rate.mean(1))
        result["values"] = {
            target: {
                **{name: float(rate[0, place]) for name, rate in rates.items()},
                "choices": int(choices[0, place]),
            }
            for target, place in targets.items()
        }
        return result


def check_targets(predictions, references):
    """A question may lack a reply of the target; a target that no question has a reply of is a slip."""
    heard = {
        target for prediction, target in zip(predictions, references, strict=True) if target in prediction["values"]
    }
    for target in references:
        if target not in heard:
            raise ValueError(f"The target {target!r} is not among the values of any of its predictions.")


def wins(prediction, target):
    """The number of choices that the target's reply is in, and how many it wins before and after (a tie is half)."""
    values = list(prediction["values"])
    if not len(set(values)) == len(values) == len(prediction["before"]) == len(prediction["after"]):
        raise ValueError(
            f"`values`, `before` and `after` must be as long as each other, each value once: {prediction}."
        )
    before = dict(zip(values, prediction["before"], strict=True))
    after = dict(zip(values, prediction["after"], strict=True))
    if target not in values:
        return 0, 0.0, 0.0
    if len(values) == 1:
        # What a judge said: the share itself.
        if not (0 <= before[target] <= 1 and 0 <= after[target] <= 1):
            raise ValueError("A judge's verdict must be from 0 to 1; to compare replies give those of several values.")
        return 1, before[target], after[target]
    opposed = f"-{target}"
    rivals = [opposed] if opposed in values else [value for value in values if value != target]
    return (
        len(rivals),
        sum(won(before[target], before[rival]) for rival in rivals),
        sum(won(after[target], after[rival]) for rival in rivals),
    )


def won(one, other):
    return 1.0 if one > other else 0.5 if one == other else 0.0


def bootstrap_weights(items, draws, seed):
    """How often each item is drawn, `[draws + 1, items]`; the first row is the estimate itself, each item once."""
    drawn = np.random.default_rng(seed).multinomial(items, [1 / items] * items, size=draws)
    return np.concatenate([np.ones((1, items)), drawn])


def interval(found):
    """The 2.5th and 97.5th percentile of the bootstrap samples in which there was something to measure."""
    there = found[1:][~np.isnan(found[1:])]
    return [float(end) for end in np.percentile(there, [2.5, 97.5])] if len(there) else [float("nan")] * 2
