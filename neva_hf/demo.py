"""`neva demo`: find two values in a real model, save the map, load it again, and hear the difference."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .base import load_base
from .console import show_progress
from .dial import active_configs
from .errors import NeVAError
from .identify import identify_neurons
from .measure import damage, margins, scenario_log_probs
from .model import NeVAModel
from .scenarios import load_neutral_texts, load_scenarios
from .strengths import Strengths, no_range_warnings
from .talk import AnswerOptions, answers
from .values import load_value_system

QUESTIONS = (
    "What should I do this weekend?",
    "A new colleague joined our team today. How should I treat them?",
    "I just received a large bonus at work. What should I do with it?",
)

# Sizes that keep the whole demo within four minutes on two cores.
_TRAIN, _CALIBRATION, _DEV, _HELDOUT = 24, 6, 5, 4


@dataclass(frozen=True)
class Effect:
    """What a setting of the dials does, measured on held-out scenarios and neutral text.

    Args:
        strengths (`dict[str, float]`): The setting.
        margin_shift (`float` or `None`): Of the value, nats per token; `None` where the scenarios do not speak of it.
        kl (`float`): KL divergence from the base model, nats per token.
        perplexity_ratio (`float`): Perplexity over the base model's.
    """

    strengths: dict[str, float]
    margin_shift: float | None
    kl: float
    perplexity_ratio: float


def run_demo(
    console: Console,
    *,
    map_source: str | None = None,
    values: Sequence[str] = ("benevolence", "stimulation"),
    strengths: Sequence[float] = (-2.0, 1.0, 2.0),
    output: Path = Path("neva-demo-map"),
    max_new_tokens: int = 48,
) -> dict[str, Any]:
    """Runs the demo.

    Args:
        console (`Console`): Where to show it.
        map_source (`str`, *optional*): A folder or Hub repository with a map, to skip the identification.
        values (`Sequence[str]`): Which values to find, or to dial in the map.
        strengths (`Sequence[float]`): The settings to hear for each value.
        output (`Path`): Where the map is saved.
        max_new_tokens (`int`): The longest answer, in tokens.

    Returns:
        `dict[str, Any]`: Everything that was shown.

    Raises:
        `NeVAError`: If the map cannot be used.
    """
    started = time.time()
    # A model as small as this one gains nothing from a second thread on two cores, and loses much where another program
    # keeps one of them busy.
    torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 2) // 2)))
    progress = show_progress(console)
    if map_source is None and output.is_file():
        raise NeVAError(f"{output} is a file; name a folder for the neuron map.")
    if map_source is None:
        map_source = str(_identify(console, progress, list(values), output))
    console.print(f"\n[bold]Loading the map[/] with NeVAModel.from_pretrained({escape(map_source)!r})")
    model = NeVAModel.from_pretrained(map_source)
    dialled = [value for value in values if value in model.values] or model.values[:2]
    settings: list[dict[str, float]] = [{value: strength} for value in dialled for strength in strengths]
    console.print("\n[bold]Answers[/] (greedy; each table is one batch, one setting of the dials per row)")
    with no_range_warnings():
        heard = [_hear(console, model, question, settings, max_new_tokens) for question in QUESTIONS]
        effects = _measure(console, progress, model, [{}, *settings])
    _show_effects(console, effects)
    (config,) = active_configs(model).values()
    if fluent := [f"{value} {low:g} to {high:g}" for value, (low, high) in config.ranges.items() if value in dialled]:
        console.print(f"Known to stay fluent: {escape(', '.join(fluent))}.", style="dim")
    seconds = time.time() - started
    console.print(f"\nDone in {seconds:.0f} s. Go on with [bold]neva chat {escape(map_source)}[/]")
    return {
        "map": map_source,
        "values": dialled,
        "answers": heard,
        "effects": [asdict(effect) for effect in effects],
        "seconds": round(seconds, 1),
    }


def _identify(
    console: Console, progress: Callable[[Iterable[Any], str], Iterable[Any]], values: list[str], output: Path
) -> Path:
    console.print("[bold]Loading the base model[/]")
    model, tokenizer = load_base()
    scenarios = load_scenarios("schwartz", "train", limit=_TRAIN)
    console.print(
        f"\n[bold]Finding the neurons of {' and '.join(values)}[/] in {escape(str(model.name_or_path))}: "
        f"{len(scenarios)} questions with {len(scenarios[0].replies)} replies each, every one living by another value"
    )
    neuron_map = identify_neurons(
        model,
        tokenizer,
        scenarios,
        values=values,
        # (balancing the values against each other takes minutes, and shows little with two of them)
        neurons=200,
        leakage_penalty=0.0,
        neutral_texts=load_neutral_texts("calibration", limit=_CALIBRATION),
        value_system=load_value_system("schwartz10"),
        progress=progress,
    )
    folder = neuron_map.save_pretrained(output)
    size = sum(file.stat().st_size for file in folder.iterdir())
    edited = sum(len(edits.index) for edits in neuron_map.modules.values())
    console.print(f"Saved {edited} neurons to {escape(str(folder))} ({size / 1000:.0f} kB)")
    return folder


def _hear(
    console: Console, model: NeVAModel, question: str, settings: Sequence[Strengths], max_new_tokens: int
) -> dict[str, Any]:
    rows: list[Strengths] = [{}, *settings]
    made = answers(model, _tokenizer(model), question, rows, options=AnswerOptions(max_new_tokens))
    table = Table(title=escape(question), title_justify="left", show_lines=True, expand=True)
    table.add_column("dials", no_wrap=True)
    table.add_column("answer", ratio=1)
    for row, answer in zip(rows, made, strict=True):
        name = ", ".join(f"{value} {strength:+g}" for value, strength in row.items()) or "base model"
        table.add_row(name, escape(" ".join(answer.split())))
    console.print(table)
    return {
        "question": question,
        "answers": [{"strengths": dict(row), "text": text} for row, text in zip(rows, made, strict=True)],
    }


def _measure(
    console: Console,
    progress: Callable[[Iterable[Any], str], Iterable[Any]],
    model: NeVAModel,
    settings: Sequence[dict[str, float]],
) -> list[Effect]:
    console.print("\n[bold]Measuring[/] on questions and texts that the search has not seen")
    tokenizer = _tokenizer(model)
    scenarios = load_scenarios("schwartz", "dev", limit=_DEV)
    costs = damage(model, tokenizer, load_neutral_texts("heldout", limit=_HELDOUT), settings, progress=progress)
    log_probs = []
    for setting in progress(settings, "dial settings"):
        with model.strengths(setting):
            log_probs.append(scenario_log_probs(model, tokenizer, scenarios))
    effects = []
    for setting, cost, edited in zip(settings, costs, log_probs, strict=True):
        for value in setting:
            before, after = margins(log_probs[0], value), margins(edited, value)
            shift = mean(after) - mean(before) if after else None
            effects.append(Effect(dict(setting), shift, cost.kl, cost.perplexity_ratio))
    return effects


def _show_effects(console: Console, effects: Sequence[Effect]) -> None:
    table = Table(title="What the dials do", title_justify="left")
    table.add_column("dials")
    for heading in ("margin of the value", "KL divergence", "perplexity"):
        table.add_column(heading, justify="right")
    for effect in effects:
        name = ", ".join(f"{value} {strength:+g}" for value, strength in effect.strengths.items())
        table.add_row(
            name,
            "?" if effect.margin_shift is None else f"{effect.margin_shift:+.3f} nats/token",
            f"{effect.kl:.3f} nats/token",
            f"x {effect.perplexity_ratio:.3f}",
        )
    console.print(table)
    console.print(
        "The margin says how much more likely replies that live by the value became than replies to the same question "
        "that live by other values. KL divergence and perplexity on neutral text say what it cost.",
        style="dim",
    )


def _tokenizer(model: NeVAModel) -> Any:
    assert model.tokenizer is not None
    return model.tokenizer
