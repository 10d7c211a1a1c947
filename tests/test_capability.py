"""Benchmarks through lm-eval: the fast inner loop against the harness' own, local files, dials, comparisons."""

from __future__ import annotations

import bz2
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, random_map, tiny_model, tiny_reader, tiny_tokenizer

from neva_hf import NeVAModel
from neva_hf.baselines.from_model import from_model
from neva_hf.baselines.method import Method
from neva_hf.errors import NeVAError
from neva_hf.evaluation.capability import Benchmarks, compared, table
from neva_hf.evaluation.capability_tasks import TASKS, questions
from neva_hf.evaluation.shared_context import _batches, continuation_log_probs

PAIRS = [
    ([3, 4, 5], [6]),
    ([3, 4, 5], [7, 8, 9]),
    ([9, 8, 7], [6, 5]),
    ([9, 8, 7], [5]),
    ([9, 8, 7], [5, 6, 7, 8]),
    ([5, 6, 7, 8, 9], [3, 4]),
    ([5, 6, 7, 8, 9, 10, 11], [3]),
    ([4], [3, 4, 5, 6]),
]


def slow_log_probs(model: Any, pairs: Any) -> list[tuple[float, bool]]:
    found = []
    for context, continuation in pairs:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0]
        told = logits[len(context) - 1 : -1].log_softmax(-1)
        wanted = torch.tensor(continuation)
        total = float(told.gather(1, wanted[:, None]).sum())
        found.append((total, bool((told.argmax(-1) == wanted).all())))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions of every benchmark, in the files' own forms, some of them in folders of their own."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "some").mkdir()
    lines = [
        json.dumps({"context": f"He met {name} and said hello to", "continuation": name}) for name in ("Ann", "Bo")
    ]
    (folder / "some" / "lambada_openai.jsonl").write_text("\n".join(lines) + "\n")
    for name, ending in (("arc_easy", ""), ("piqa", "\n")):
        rows = [
            {
                "query": f"Question: What is {number} and one?{ending}",
                "choices": [str(number), f"it is {number + 1}", "none of these, is it?"],
                "gold": 1,
            }
            for number in range(6)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "".join(
        f"Cooking: He takes {n} eggs. he\n{n % 4}\nboils [step] them.\nruns.\neats.\nis.\n" for n in range(5)
    )
    (folder / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress(text.encode()))
    with (folder / "mmlu_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "question", "choice0", "choice1", "choice2", "choice3", "answer"])
        writer.writerows([["high_school_physics", f"What, is\n{n}?", 1, 2, 3, 4, n % 4] for n in range(5)])
    return folder


@pytest.fixture(scope="module")
def pair() -> tuple[NeVAModel, Any]:
    base = tiny_reader(seed=3)
    return random_map(base, size=1.0).apply_to(base), tiny_tokenizer()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tokens", [1, 12, 1000])
def test_shared_contexts_give_the_log_probabilities_of_whole_sequences(architecture: str, tokens: int) -> None:
    model = tiny_model(architecture)
    found = continuation_log_probs(model, PAIRS, tokens=tokens)
    slow = slow_log_probs(model, PAIRS)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in slow], abs=2e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in slow]


def test_greedy_continuations_are_told_from_others() -> None:
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7]])
    written = model.generate(ids, max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    other = [(written[0] + 1) % 90, *written[1:]]
    for share in (True, False):
        found = continuation_log_probs(model, [([5, 6, 7], written), ([5, 6, 7], other)], share=share)
        assert [greedy for _, greedy in found] == [True, False]


def test_contexts_are_run_once_and_logits_only_where_answers_stand() -> None:
    model = tiny_model()
    seen: list[tuple[int, int]] = []
    forward = model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        seen.append((kwargs["input_ids"].numel(), output.logits.shape[0] * output.logits.shape[1]))
        return output

    model.forward = watched
    context = list(range(3, 43))
    continuation_log_probs(model, [(context, [one, one + 1]) for one in range(3, 7)])
    assert seen == [(40, 1), (4, 4)]


@pytest.mark.parametrize("worth", [0, 5, 1000])
def test_batches_are_cut_at_the_least_cost(worth: int) -> None:
    lengths, tokens = [3, 9, 2, 2, 5, 8, 9], 24
    ordered = sorted(lengths, reverse=True)

    def cost(batches: list[list[int]]) -> float:
        sizes = [len(batch) * batch[0] for batch in batches]
        return sum(sizes) + worth * len(batches) if max(sizes) <= tokens else math.inf

    every = []
    for cuts in range(2 ** (len(ordered) - 1)):
        ends = [at + 1 for at in range(len(ordered) - 1) if cuts >> at & 1]
        places = zip([0, *ends], [*ends, len(ordered)], strict=True)
        every.append(cost([ordered[start:end] for start, end in places]))
    found = _batches(lengths, lambda length: length, tokens, worth)
    assert [length for batch in found for length in batch] == ordered
    assert cost(found) == min(every)
    # What is too long by itself is run by itself.
    assert _batches([50, 1], lambda length: length, tokens, 0) == [[50], [1]]


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(NeVAError, match="empty"):
        continuation_log_probs(tiny_model(), [([3], [])])


def test_all_benchmarks_give_the_answers_of_the_plain_harness(pair: tuple[NeVAModel, Any], data: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = pair
    benchmarks = Benchmarks(model, tokenizer, data)
    kept: list[list[tuple[float, bool]]] = []

    def watch(harness: Any) -> None:
        inner = harness._loglikelihood_tokens
        harness._loglikelihood_tokens = lambda *args, **kwargs: kept.append(inner(*args, **kwargs)) or kept[-1]

    watch(benchmarks._harness)
    fast = benchmarks.ask()
    benchmarks._harness = HFLM(pretrained=model.get_base_model(), tokenizer=tokenizer, batch_size=4)
    watch(benchmarks._harness)
    plain = benchmarks.ask()
    assert fast == plain
    assert set(fast) == set(TASKS)
    assert {name: len(found) for name, found in fast.items()} == {
        "lambada": 2, "arc_easy": 6, "piqa": 6, "hellaswag": 5, "mmlu": 5,
    }  # fmt: skip
    assert [one for one, _ in kept[0]] == pytest.approx([one for one, _ in kept[1]], abs=1e-3)
    assert [greedy for _, greedy in kept[0]] == [greedy for _, greedy in kept[1]]


def test_what_is_too_long_loses_its_beginning_as_in_the_harness(data: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_reader(max_position_embeddings=40), tiny_tokenizer()
    benchmarks = Benchmarks(model, tokenizer, data, ["arc_easy"])
    requests = [(("", ""), list(range(3, 60)), [5, 6]), (("", ""), list(range(3, 60)), [7])]
    ours = benchmarks._harness._loglikelihood_tokens(requests, disable_tqdm=True)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [one for one, _ in ours] == pytest.approx([one for one, _ in theirs], abs=1e-4)


def test_dials_are_in_force_while_questions_are_asked_and_only_then(pair: tuple[NeVAModel, Any], data: Path) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = pair
    benchmarks = Benchmarks(model, tokenizer, data, ["lambada"])
    told: list[list[tuple[float, bool]]] = []
    inner = benchmarks._harness._loglikelihood_tokens
    benchmarks._harness._loglikelihood_tokens = lambda *a, **k: told.append(inner(*a, **k)) or told[-1]
    benchmarks.ask()
    benchmarks.ask(from_model(model), {"power": 2.0})
    benchmarks.ask(from_model(model), {})
    benchmarks.ask()
    assert told[0] != told[1]
    assert told[0] == told[2] == told[3]


def test_a_system_prompt_stands_in_front_of_every_question(pair: tuple[NeVAModel, Any], data: Path) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = pair
    benchmarks = Benchmarks(model, tokenizer, data, ["arc_easy"])
    asked: list[str] = []
    inner = benchmarks._harness._loglikelihood_tokens

    def spy(requests: Any, **kwargs: Any) -> Any:
        asked.extend(context for (context, _), _, _ in requests)
        return inner(requests, **kwargs)

    benchmarks._harness._loglikelihood_tokens = spy
    prompted = Method("prompt", ["power"], from_model(model).at, lambda dials: "Be bold." if dials else None)
    benchmarks.ask(prompted, {"power": 1.0})
    assert asked
    assert all(context.startswith("Be bold.") for context in asked)
    asked.clear()
    benchmarks.ask(prompted, {})
    assert not any("Be bold." in context for context in asked)


def test_the_first_questions_are_the_same_draw_whatever_the_limit(data: Path) -> None:
    everything = questions("arc_easy", data)
    assert questions("arc_easy", data, 3) == everything[:3]
    assert [one["query"] for one in everything] != sorted(one["query"] for one in everything)
    assert all(one["query"].startswith("Question: ") and one["query"].endswith("?\nAnswer:") for one in everything)


def test_files_are_read_into_the_harness_own_prompts(data: Path) -> None:
    piqa, swag, mmlu = (questions(name, data)[0] for name in ("piqa", "hellaswag", "mmlu"))
    assert piqa["query"].endswith("?\nAnswer:")
    assert swag["query"].startswith("Cooking: He takes")
    assert swag["choices"][0] == "boils them."
    assert mmlu["query"].startswith(
        "The following are multiple choice questions (with answers) about high school physics."
    )
    assert mmlu["query"].endswith("\nD. 4\nAnswer:")
    assert mmlu["choices"] == ["A", "B", "C", "D"]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"arc_easy\.jsonl.*llm-foundry"):
        questions("arc_easy", tmp_path)
    with pytest.raises(NeVAError, match="no benchmark 'glue'"):
        questions("glue", tmp_path)
    with pytest.raises(NeVAError, match="no folder"):
        questions("piqa", tmp_path / "nowhere")
    (tmp_path / "piqa.jsonl").write_text('{"goal": 1}\n')
    with pytest.raises(NeVAError, match="no file of PIQA"):
        questions("piqa", tmp_path)
    (tmp_path / "hellaswag_val_full.txt").write_text("one\ntwo\n")
    with pytest.raises(NeVAError, match="six"):
        questions("hellaswag", tmp_path)


def test_differences_are_paired() -> None:
    found = compared("1100", "1001")
    assert (found.base, found.accuracy, found.points, found.questions) == (0.5, 0.5, 0.0, 4)
    assert found.error == pytest.approx(100 * math.sqrt(2 / 3) / 2)
    same = compared("1100", "1100")
    assert (same.points, same.error) == (0.0, 0.0)


def test_several_settings_share_their_questions() -> None:
    found = compared("1100", ["0100", "1100"])
    assert found.points == pytest.approx(-12.5)
    # The mean change of each question is -1/2, 0, 0, 0.
    assert found.error == pytest.approx(100 * 0.25 / 2)
    assert table({"a": "10"}, {"x": {"a": "11"}})["x"]["a"].points == 50.0


def test_answers_to_other_questions_are_not_compared() -> None:
    with pytest.raises(NeVAError, match="same questions"):
        compared("110", "11")
    with pytest.raises(NeVAError, match="same questions"):
        compared("", "")
