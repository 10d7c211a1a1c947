"""The shipped scenarios and neutral texts are sound, and a user's own are read or refused with file and line."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neva_hf import NeVAError, Scenario, load_scenarios, load_value_system, scenarios
from neva_hf.scenarios import (
    NEUTRAL_SPLITS,
    SCENARIO_SETS,
    SPLITS,
    load_neutral_texts,
    scenario_values,
    scenarios_hash,
)
from neva_hf.scenarios.loader import MAX_TEXT

FORMS = {"advice", "argument", "dilemma", "first_person", "policy", "story"}
REPLIES = {"power": "Take the lead.", "security": "Stay at home."}
GOOD: dict[str, Any] = {"question": "What now?", "replies": REPLIES}

SHIPPED = Path(scenarios.__file__).parent

each_set = pytest.mark.parametrize("name", SCENARIO_SETS)
each_split = pytest.mark.parametrize("split", SPLITS)


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


# The shipped sets


@each_split
def test_every_scenario_of_schwartz_has_a_reply_of_all_ten_values_in_their_order(split: str) -> None:
    ten = list(load_value_system("schwartz10").names)
    assert len(ten) == 10
    found = load_scenarios("schwartz", split)
    assert len(found) >= 30
    assert all(list(scenario.replies) == scenario.values == ten for scenario in found)
    assert scenario_values(found) == ten


@each_split
def test_every_form_of_question_is_asked_as_often_and_the_first_six_cover_all(split: str) -> None:
    found = load_scenarios("schwartz", split)
    counts = Counter(scenario.form for scenario in found)
    assert set(counts) == FORMS
    assert len(set(counts.values())) == 1
    assert {scenario.form for scenario in load_scenarios("schwartz", split, limit=len(FORMS))} == FORMS


@each_set
def test_the_splits_share_no_domain_no_id_no_question_and_no_reply(name: str) -> None:
    splits = [load_scenarios(name, path.stem) for path in sorted((SHIPPED / name).glob("*.jsonl"))]
    for one, other in itertools.combinations(splits, 2):
        for words in (
            lambda scenario: {scenario.domain},
            lambda scenario: {scenario.id},
            lambda scenario: {scenario.question},
            lambda scenario: set(scenario.replies.values()),
        ):
            assert not set().union(*map(words, one)) & set().union(*map(words, other))


@each_set
def test_every_shipped_scenario_has_its_own_id_and_no_reply_stands_twice(name: str) -> None:
    found = load_scenarios(name, split=None)
    for texts in (
        [scenario.id for scenario in found],
        [scenario.question for scenario in found],
        [reply for scenario in found for reply in scenario.replies.values()],
    ):
        assert all(texts)
        assert len(set(texts)) == len(texts)
    assert all(scenario.id == f"{scenario.domain}-{scenario.form}" for scenario in found)


@each_set
def test_replies_to_one_question_differ_little_in_length(name: str) -> None:
    for scenario in load_scenarios(name, split=None):
        lengths = [len(reply) for reply in scenario.replies.values()]
        assert max(lengths) / min(lengths) <= 1.3, scenario.id


@each_set
def test_no_value_has_the_longer_replies(name: str) -> None:
    found = load_scenarios(name, split=None)
    totals = [sum(len(scenario.replies[key]) for scenario in found) for key in found[0].replies]
    assert max(totals) / min(totals) < 1.1


# The neutral texts


def test_neutral_texts_are_one_to_three_hundred_words_each_and_differ() -> None:
    texts = [text for split in NEUTRAL_SPLITS for text in load_neutral_texts(split)]
    assert len(texts) == len(set(texts)) == 176
    assert all(100 <= len(text.split()) <= 300 for text in texts)


def test_neutral_texts_can_be_limited_from_the_front() -> None:
    assert load_neutral_texts("heldout", limit=3) == load_neutral_texts("heldout")[:3]


def test_a_split_of_neutral_text_that_does_not_exist_is_refused() -> None:
    with pytest.raises(NeVAError, match=r"no neutral text 'train': choose one of \['calibration', 'heldout'\]"):
        load_neutral_texts("train")


# A user's own


def test_a_users_file_is_read_in_its_order_with_all_its_fields(tmp_path: Path) -> None:
    full = {**GOOD, "id": "b", "domain": "work", "form": "advice"}
    path = write(tmp_path / "mine.jsonl", {**GOOD, "id": "z"}, full, GOOD)
    found = load_scenarios(path)
    assert [scenario.id for scenario in found] == ["z", "b", ""]
    assert found[1] == Scenario("What now?", REPLIES, id="b", domain="work", form="advice")
    assert load_scenarios(str(path), split="no matter for a file") == found


def test_a_users_folder_is_read_by_splits_or_whole(tmp_path: Path) -> None:
    for split in ("dev", "train"):
        write(tmp_path / f"{split}.jsonl", {**GOOD, "id": split})
    assert [scenario.id for scenario in load_scenarios(tmp_path)] == ["train"]
    assert [scenario.id for scenario in load_scenarios(tmp_path, "dev")] == ["dev"]
    assert [scenario.id for scenario in load_scenarios(tmp_path, split=None)] == ["dev", "train"]
    with pytest.raises(NeVAError, match=r"no split 'test' in .*test.jsonl is missing \(found: \['dev', 'train'\]\)"):
        load_scenarios(tmp_path, "test")


def test_a_place_with_nothing_is_explained(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"no scenarios at 'schwarz': give one of the shipped sets \['schwartz', 'big"):
        load_scenarios("schwarz")
    with pytest.raises(NeVAError, match=r"empty.jsonl holds no scenarios"):
        load_scenarios(write(tmp_path / "empty.jsonl", "", "  "))


def test_empty_lines_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "windows.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line + b"\r\n")
    assert load_scenarios(path) == [Scenario(**GOOD)] * 2


def test_separators_inside_of_a_text_do_not_cut_a_line(tmp_path: Path) -> None:
    question = "one\u2028two\u0085three\u000bfour"
    path = tmp_path / "separators.jsonl"
    path.write_text(json.dumps({**GOOD, "question": question}, ensure_ascii=False), encoding="utf-8")
    assert [scenario.question for scenario in load_scenarios(path)] == [question]


def test_single_traits_are_values_with_an_opposing_reply(tmp_path: Path) -> None:
    replies = {"extraversion": "Go to the party.", "-extraversion": "Stay in.", "-openness": "As ever."}
    (found,) = load_scenarios(write(tmp_path / "traits.jsonl", {"question": "Tonight?", "replies": replies}))
    assert found.replies == replies
    assert found.values == scenario_values([found]) == ["extraversion", "openness"]


def test_what_datasets_fills_with_none_is_not_there(tmp_path: Path) -> None:
    empty = {"id": None, "domain": None, "form": None}
    line = {**GOOD, **empty, "replies": {**REPLIES, "hedonism": None}}
    assert load_scenarios(write(tmp_path / "filled.jsonl", line)) == [Scenario(**GOOD)]


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_a_limit_takes_from_the_front(limit: int, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", *({**GOOD, "id": str(number)} for number in range(3)))
    assert load_scenarios(path, limit=limit) == load_scenarios(path)[:limit]


@pytest.mark.parametrize("load", [load_scenarios, load_neutral_texts])
@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(load: Callable[..., Any], limit: int) -> None:
    with pytest.raises(NeVAError, match=f"`limit` must be at least 1, got {limit}"):
        load(limit=limit)


# Wrong lines


def with_replies(**replies: Any) -> dict[str, Any]:
    return {**GOOD, "replies": replies}


WRONG: dict[str, tuple[Any, str]] = {
    "no JSON": ("{'question': 1}", r"not valid JSON \(Expecting property name"),
    "cut short": ('{"question": "What', "not valid JSON"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "a list": ([GOOD], "expected a JSON object with `question` and `replies`"),
    "a number": (7, "expected a JSON object"),
    "no question": ({"replies": REPLIES}, "missing field 'question'; a scenario has the fields"),
    "no replies": ({"question": "What now?"}, "missing field 'replies'"),
    "a field too many": ({**GOOD, "answers": {}}, r"unknown field 'answers'; .*'domain', 'form', 'id', 'question'"),
    "a repeated reply": (
        '{"question": "Q?", "replies": {"power": "a", "security": "b", "power": "c"}}',
        "the key 'power' stands twice",
    ),
    "an empty question": ({**GOOD, "question": " "}, "`question` must be some text, got ' '"),
    "a question that is a number": ({**GOOD, "question": 5}, "`question` must be some text, got 5"),
    "replies in a list": ({**GOOD, "replies": ["a", "b"]}, "`replies` must map each value to a reply"),
    "one reply": (with_replies(power="a"), "at least two replies to contrast, got 1"),
    "one reply and a null": (with_replies(power="a", security=None), "at least two replies to contrast, got 1"),
    "a value in capitals": (with_replies(power="a", Security="b"), "'Security' in `replies` is no value name"),
    "a value with a space": (with_replies(power="a", **{"self direction": "b"}), "'self direction' in `replies`"),
    "a value of nothing": (with_replies(power="a", **{"-": "b"}), "'-' in `replies` is no value name"),
    "an empty reply": (with_replies(power="a", security=""), "the reply of 'security' must be some text, got ''"),
    "a reply in a list": (with_replies(power="a", security=["b"]), r"the reply of 'security' .* got \['b'\]"),
    "an endless reply": (
        with_replies(power="a", security="b" * (MAX_TEXT + 1)),
        "the reply of 'security' has 20001 characters, more than 20000",
    ),
    "an id that is a number": ({**GOOD, "id": 5}, "`id` must be some text, got 5"),
    "an id in a list": ({**GOOD, "id": ["a"]}, r"`id` must be some text, got \['a'\]"),
    "a domain that is a number": ({**GOOD, "domain": 5}, "`domain` must be some text"),
    "a form that is an object": ({**GOOD, "form": {}}, "`form` must be some text"),
    "an id that is taken": ({**GOOD, "id": "first"}, "the id 'first' stands in line 1 already"),
}


@pytest.mark.parametrize(("line", "says"), WRONG.values(), ids=WRONG)
def test_a_wrong_line_is_named_by_file_and_number(line: Any, says: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", {**GOOD, "id": "first"}, "", line)
    with pytest.raises(NeVAError, match=rf"mine.jsonl, line 3: .*{says}") as caught:
        load_scenarios(path)
    assert len(str(caught.value)) < 600


def test_a_file_that_is_no_text_is_explained(tmp_path: Path) -> None:
    (tmp_path / "image.jsonl").write_bytes(b"\x89PNG")
    with pytest.raises(NeVAError, match=r"image.jsonl is not UTF-8 text \(invalid start byte at byte 0\)"):
        load_scenarios(tmp_path / "image.jsonl")


# The fingerprint


def test_the_hash_is_the_same_for_the_same_words() -> None:
    once, again = (load_scenarios(limit=3) for _ in range(2))
    assert scenarios_hash(once) == scenarios_hash(again)
    assert len(scenarios_hash(once)) == 64


def test_the_hash_changes_with_any_word_any_value_and_the_order() -> None:
    def fingerprint(*scenarios: dict[str, Any]) -> str:
        return scenarios_hash([Scenario(**scenario) for scenario in scenarios])

    other: dict[str, Any] = {"question": "And then?", "replies": REPLIES}
    kinds = [
        [GOOD, other],
        [other, GOOD],
        [GOOD],
        [GOOD, GOOD],
        [{**GOOD, "question": "What now"}, other],
        [with_replies(power="Take the lead.", security="Stay at Home."), other],
        [with_replies(power="Take the lead.", tradition="Stay at home."), other],
        [with_replies(**{"power": "Take the lead.", "-power": "Stay at home."}), other],
        [with_replies(security="Stay at home.", power="Take the lead."), other],
    ]
    assert len({fingerprint(*kind) for kind in kinds}) == len(kinds)


def test_the_hash_leaves_labels_out() -> None:
    assert scenarios_hash([Scenario(**GOOD, id="a", domain="b", form="c")]) == scenarios_hash([Scenario(**GOOD)])
