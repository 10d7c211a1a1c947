"""The shipped scenarios are honest, as far as it can be measured; and the lint finds each fault that is planted."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
import socket
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from neva_hf import NeVAError, Scenario, load_scenarios, scenarios
from neva_hf.scenarios import SCENARIO_SETS, lint, load_neutral_texts, style
from neva_hf.scenarios.lint import Finding, lint_scenarios

SHIPPED = Path(scenarios.__file__).parent
FILES = [(name, path.stem) for name in SCENARIO_SETS for path in sorted((SHIPPED / name).glob("*.jsonl"))]
PAIRS = [("dev", "train"), ("test", "train"), ("test", "dev")]

each_set = pytest.mark.parametrize("name", SCENARIO_SETS)
each_file = pytest.mark.parametrize(("name", "split"), FILES)
each_pair = pytest.mark.parametrize(("one", "other"), PAIRS)
unseen_splits = pytest.mark.parametrize("split", ["dev", "test"])


def spread(scenarios: list[Scenario], count: str) -> float:
    """How many times as large the mean of a count is for the value with most as for the one with least."""
    means = [found[count] for found in style.mean_counts(scenarios).values()]
    return max(means) / min(means)


# The shipped scenarios: nothing that can be counted tells a value


@each_file
def test_the_longest_reply_of_a_scenario_has_at_most_a_fifth_more_words(name: str, split: str) -> None:
    for scenario in load_scenarios(name, split):
        lengths = [len(lint.words(reply)) for reply in scenario.replies.values()]
        assert max(lengths) <= 1.2 * min(lengths), scenario.id


@each_file
def test_replies_of_a_scenario_have_the_same_commas_and_full_stops_and_no_other_marks(name: str, split: str) -> None:
    for scenario in load_scenarios(name, split):
        replies = list(scenario.replies.values())
        assert len({(reply.count(","), reply.count(".")) for reply in replies}) == 1, scenario.id
        assert not set("".join(replies)) & set(';:!?()"—–…“”‘’'), scenario.id


@each_file
def test_no_shipped_reply_negates_or_denies(name: str, split: str) -> None:
    found = [(scenario.id, *lint.negations(reply)) for scenario in load_scenarios(name, split)
             for reply in scenario.replies.values() if lint.negations(reply)]  # fmt: skip
    assert found == []


@each_file
def test_no_shipped_reply_names_any_value(name: str, split: str) -> None:
    found = load_scenarios(name, split)
    names = scenarios.scenario_values(found)
    assert [reply for one in found for reply in one.replies.values() if lint.named_values(reply, names)] == []


@each_file
def test_the_mean_counts_of_all_values_are_nearly_equal(name: str, split: str) -> None:
    found = load_scenarios(name, split)
    assert spread(found, "words") <= (1.05 if name == "schwartz" else 1.07)
    assert spread(found, "characters") <= 1.1
    assert spread(found, "commas") == spread(found, "full stops") == 1


@unseen_splits
@pytest.mark.parametrize(("relative", "most"), [(False, 0.15), (True, 0.18)])
def test_counts_tell_the_value_of_an_unseen_reply_hardly_better_than_chance(
    split: str, relative: bool, most: float
) -> None:
    train, unseen = load_scenarios("schwartz", "train"), load_scenarios("schwartz", split)
    assert style.count_accuracy(train, unseen, relative=relative) <= most


@unseen_splits
@pytest.mark.parametrize("C", [0.01, 0.1, 1])
def test_style_that_is_learnt_from_the_training_replies_tells_few_values_of_unseen_ones(split: str, C: float) -> None:
    assert style.style_accuracy(load_scenarios("schwartz", "train"), load_scenarios("schwartz", split), C) <= 0.20


# The shipped scenarios: nothing recurs


def test_no_phrase_of_five_words_stands_in_more_than_two_replies() -> None:
    everything = [scenario for name in SCENARIO_SETS for scenario in load_scenarios(name, split=None)]
    assert lint.repeated_phrases(everything, 5, 2) == {}


@each_pair
def test_no_seven_words_in_a_row_stand_in_two_splits(one: str, other: str) -> None:
    assert lint.shared_phrases(load_scenarios("schwartz", one), load_scenarios("schwartz", other), 7) == {}


@unseen_splits
def test_no_five_words_in_a_row_of_an_unseen_reply_stand_in_the_training_split(split: str) -> None:
    unseen, train = load_scenarios("schwartz", split), load_scenarios("schwartz", "train")
    assert lint.shared_phrases(unseen, train, 5, questions=False) == {}


@each_pair
def test_no_text_has_a_near_duplicate_in_another_split(one: str, other: str) -> None:
    first, second = load_scenarios("schwartz", one), load_scenarios("schwartz", other)
    assert lint.near_duplicates(first, second, similarity=0.5) == []


@each_set
def test_no_two_replies_are_nearly_the_same_and_no_two_questions_quite(name: str) -> None:
    pairs = lint.near_duplicates(load_scenarios(name, split=None), similarity=0.6)
    assert all(alike < 0.7 for alike, _, _ in pairs)
    assert [pair for pair in pairs if pair[1][1] or pair[2][1]] == []


@each_pair
def test_no_domain_is_in_two_splits(one: str, other: str) -> None:
    first, second = ({scenario.domain for scenario in load_scenarios("schwartz", split)} for split in (one, other))
    assert first
    assert not first & second


@each_set
def test_the_lint_has_nothing_to_say_of_the_shipped_scenarios(name: str) -> None:
    assert lint_scenarios(load_scenarios(name, split=None)) == []


# The folder is a dataset

SCENARIO_COLUMNS = ["id", "domain", "form", "question", "replies"]
CONFIGS: dict[str, tuple[dict[str, int], list[str]]] = {
    "schwartz": ({"train": 198, "dev": 36, "test": 36}, SCENARIO_COLUMNS),
    "big_five": ({"train": 10}, SCENARIO_COLUMNS),
    "neutral": ({"calibration": 144, "heldout": 32}, ["id", "kind", "text"]),
}


@pytest.fixture
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("this test is offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("config", CONFIGS)
def test_datasets_loads_every_config_from_the_folder_offline(config: str, tmp_path: Path) -> None:
    rows, columns = CONFIGS[config]
    loaded = datasets.load_dataset(str(SHIPPED), config, cache_dir=str(tmp_path))
    assert {split: part.num_rows for split, part in loaded.items()} == rows
    assert all(part.column_names == columns for part in loaded.values())
    for split, part in loaded.items():
        if config == "neutral":
            assert list(part["text"]) == load_neutral_texts(split)
        else:
            assert [Scenario(**row) for row in part] == load_scenarios(config, split)


@pytest.mark.usefixtures("_offline")
def test_without_a_config_datasets_loads_schwartz(tmp_path: Path) -> None:
    test = datasets.load_dataset(str(SHIPPED), split="test", cache_dir=str(tmp_path))
    assert list(test["id"]) == [scenario.id for scenario in load_scenarios("schwartz", "test")]


@pytest.mark.usefixtures("_offline")
def test_what_datasets_fills_with_none_is_dropped_by_a_scenario(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"question": "Where to?", "replies": {"power": "To the top.", "security": "Home."}},
        {"question": "And now?", "replies": {"power": "On.", "-power": "Down."}},
    ]
    (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    rows = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    # Version 4 fills the rows to the same keys; version 5 may keep them as they are.
    assert rows[0]["replies"] in (lines[0]["replies"], {**lines[0]["replies"], "-power": None})
    assert [dict(Scenario(**row).replies) for row in rows] == [line["replies"] for line in lines]


@pytest.mark.usefixtures("_offline")
def test_the_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    blocks = re.findall(r"```py\n(.*?)```", (SHIPPED / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("path/to/this/folder", str(SHIPPED)), names)
    assert names["scenarios"] == load_scenarios("schwartz", "test")
    assert names["replies"] == load_scenarios("schwartz", "test")[0].replies


# Planted faults

TEXTS = {
    "power": "Take the chair at every meeting, and let them follow your lead.",
    "security": "Put some savings aside each month, and check the locks at night.",
    "benevolence": "Bring warm soup to your old neighbour, and stay for a chat.",
}
RULES = ("length", "name", "negation", "phrase", "duplicate", "missing", "few")


def sound(number: int = 0, **changes: str | None) -> Scenario:
    """A scenario in which nothing is wrong, but for the changes."""
    replies = {value: text for value, text in {**TEXTS, **changes}.items() if text is not None}
    return Scenario("What should I do this year?", replies, id=f"s{number}")


def found(*scenarios: Scenario, **options: Any) -> list[Finding]:
    return lint_scenarios(scenarios, **{"min_replies": 1, **options})


def test_sound_scenarios_have_no_findings() -> None:
    assert found(sound()) == []
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "rule", "message"),
    [
        ({"power": TEXTS["power"] + " Then command the whole floor."}, "length", "17 words, .* of [a-z]+ 12"),
        ({"power": TEXTS["power"].replace("lead", "powerful lead")}, "name", "names the value power"),
        ({"power": TEXTS["power"].replace("lead", "secure lead")}, "name", "names the value security"),
        ({"power": TEXTS["power"].replace("let", "never let")}, "negation", "says 'never'"),
        ({"power": TEXTS["power"].replace("let them", "don’t let them")}, "negation", 'says "don\'t"'),
        ({"power": TEXTS["security"].replace("some", "your")}, "duplicate", r"like s0, security \(similarity 0\.[89]"),
    ],
)
def test_a_fault_of_one_reply_is_found_where_it_is(changes: dict[str, str], rule: str, message: str) -> None:
    findings = found(sound(**changes))
    assert [(one.rule, one.scenario, one.value) for one in findings] == [(rule, "s0", "power")]
    assert re.search(message, findings[0].message)


def test_a_phrase_that_recurs_is_found_once_with_its_number() -> None:
    tail = "at the end of every single day"
    changed = {value: f"{TEXTS[value].split(',')[0]} {tail}." for value in TEXTS}
    assert {one.rule for one in found(sound(**changed), phrase_replies=3)} == set()
    phrases = [one for one in found(sound(**changed)) if one.rule == "phrase"]
    assert phrases[0] == Finding("phrase", "s0", "power", "'at the end of every' stands in 3 replies")
    assert len(phrases) == 3


def test_a_question_that_is_asked_twice_is_found() -> None:
    other = Scenario(
        "What should I do this year?", {"power": "Run for mayor.", "security": "Buy good insurance."}, id="b"
    )
    assert found(sound(), other, values=[]) == [Finding("duplicate", "s0", "", "is like b (similarity 1.00)")]
    assert found(sound(), other, values=[], similarity=None) == []


def test_a_missing_value_is_found_from_the_other_scenarios_or_from_what_is_asked_for() -> None:
    rest = {"similarity": None, "phrase_replies": 9}
    assert found(sound(0), sound(1, power=None), **rest) == [Finding("missing", "s1", "power", "has no reply")]
    assert {(one.rule, one.value) for one in found(sound(), values=["power", "hedonism"], **rest)} == {
        ("missing", "hedonism"),
        ("few", "hedonism"),
    }
    assert found(sound(0), sound(1, power=None), values=["security"], **rest) == []


def test_a_pole_is_a_reply_of_its_own_and_names_its_trait_all_the_same() -> None:
    trait = {
        "extraversion": "Dance with everybody at the party tonight.",
        "-extraversion": "Read at home with the cat.",
    }
    whole = Scenario("Tonight?", trait, id="a")
    half = Scenario(
        "Later?", {"extraversion": "Sing aloud in a crowded bar.", "-openness": "Do as extraversion asks you."}
    )
    findings = found(whole, half, values=list(trait))
    assert [(one.rule, one.scenario, one.value) for one in findings] == [
        ("name", "#2", "-openness"),
        ("missing", "#2", "-extraversion"),
    ]


def test_a_value_with_few_replies_in_all_is_found() -> None:
    findings = lint_scenarios([sound(0), sound(1)], min_replies=3, similarity=None, phrase_replies=2)
    assert findings == [Finding("few", "", value, "has 2 replies in all, fewer than 3") for value in TEXTS]
    assert lint_scenarios([sound(0), sound(1)], min_replies=2, similarity=None) == []


def test_several_faults_are_listed_rule_by_rule() -> None:
    bad = sound(1, power="No power without TRADITION, and never any lack of it for anybody in the house tonight.")
    rules = [one.rule for one in found(sound(0), bad, values=[*TEXTS, "tradition"], min_replies=3)]
    assert rules == sorted(rules, key=RULES.index)
    assert set(rules) == set(RULES) - {"phrase"}


def test_a_finding_reads_as_a_line() -> None:
    assert str(Finding("name", "s0", "power", "names it")) == "s0, power: names it [name]"
    assert str(Finding("few", "", "power", "is rare")) == "power: is rare [few]"


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("Note the knot in nobles' nonsense, and unstop the stopwatch.", []),
        ("I can't and cannot, nor won’t.", ["can't", "cannot", "nor", "won't"]),
        ("Rather than stay, go without instead.", ["Rather than", "without", "instead"]),
        ("He refuses, denies, avoids and ignored it.", ["refuses", "denies", "avoids", "ignored"]),
        ("Nobody has nothing. No!", ["Nobody", "nothing", "No"]),
    ],
)
def test_negations_are_words_not_parts_of_words(text: str, negated: list[str]) -> None:
    assert lint.negations(text) == negated


@pytest.mark.parametrize(
    ("text", "values", "named"),
    [
        ("A self-directed, autonomous life", ["self_direction"], ["self_direction"]),
        ("Direct them yourself", ["self_direction"], []),
        ("It stimulates", ["stimulation", "hedonism"], ["stimulation"]),
        ("The universe and its universities are open", ["universalism", "openness"], []),
        ("Universal rights", ["universalism"], ["universalism"]),
        ("Achieving is conforming", ["achievement", "conformity"], ["achievement", "conformity"]),
        (
            "Neurotic and conscientiously kept",
            ["-neuroticism", "conscientiousness"],
            ["neuroticism", "conscientiousness"],
        ),
        ("Save face", ["face"], ["face"]),
        ("On the surface, facets", ["face"], []),
        ("More security", ["security_personal", "security_societal"], ["security_personal", "security_societal"]),
        ("A person of society", ["security_personal", "security_societal"], []),
    ],
)
def test_a_name_is_found_in_its_inflections(text: str, values: list[str], named: list[str]) -> None:
    assert lint.named_values(text, values) == named


def test_counts_are_what_they_say() -> None:
    assert dict(zip(style.COUNTS, style.counts("Well, I won't. A two-part, odd day."), strict=True)) == {
        "words": 7,
        "characters": 35,
        "commas": 2,
        "full stops": 2,
        "negation words": 1,
    }


def test_masking_leaves_style_only() -> None:
    assert style.mask_content("She’d rather swim, since 12 rivers DON'T freeze; Malmö's too!") == (
        "she'd rather x , since x x don't x ; x too !"
    )


# Planted faults that a classifier finds


def drawn(seed: int, value_texts: dict[str, Any]) -> list[Scenario]:
    """Forty scenarios of random content words, written by one function for each value."""
    draw = random.Random(seed)
    contents = [f"{a}{b}ing" for a, b in itertools.product("bdfgklmnprst", ["oom", "ark", "ump", "ist"])]
    return [
        Scenario(f"Question {number}?", {value: text(draw, contents) for value, text in value_texts.items()})
        for number in range(40)
    ]


def sentence(draw: random.Random, contents: list[str], style: str, length: int = 12) -> str:
    found = [*draw.choices(contents, k=length - len(style.split())), *style.split()]
    return " ".join(draw.sample(found, len(found))) + "."


def any_style(draw: random.Random, contents: list[str]) -> str:
    return sentence(draw, contents, draw.choice(["the from", "a with", "and into"]))


@pytest.mark.parametrize("C", [0.01, 0.1, 1])
def test_values_that_are_told_by_style_words_are_found_and_content_is_not_seen(C: float) -> None:
    styles = {value: lambda draw, c, s=style: sentence(draw, c, s) for value, style in
              {"power": "the from", "security": "a with", "hedonism": "and into"}.items()}  # fmt: skip
    told = [drawn(seed, styles) for seed in (1, 2)]
    assert style.style_accuracy(*told, C) == 1
    # Each value has its content words, and any style.
    topics = {
        value: lambda draw, _, w=word: any_style(draw, [w, w + "s"])
        for value, word in {"power": "throne", "security": "lock", "hedonism": "cake"}.items()
    }
    untold = [drawn(seed, topics) for seed in (1, 2)]
    assert style.style_accuracy(*untold, C) < 0.5


def test_values_that_are_told_by_counts_are_found() -> None:
    def of_length(longer: int, vary: int) -> Any:
        state = {"at": 0}

        def write(draw: random.Random, contents: list[str]) -> str:
            state["at"] += 1
            return sentence(draw, contents, "", 12 + longer + state["at"] * 7 % 10 * vary)

        return write

    told = [drawn(seed, {"power": of_length(0, 0), "security": of_length(4, 0)}) for seed in (1, 2)]
    assert style.count_accuracy(*told) == 1
    # All lengths vary more between scenarios than the values differ.
    hidden = [drawn(seed, {"power": of_length(0, 8), "security": of_length(2, 8)}) for seed in (1, 2)]
    assert style.count_accuracy(*hidden) < 0.7
    assert style.count_accuracy(*hidden, relative=True) > 0.9
    assert style.count_accuracy(*[drawn(seed, {"power": any_style, "security": any_style}) for seed in (1, 2)]) < 0.65


def test_values_with_other_commas_or_negations_are_found() -> None:
    commas = {
        "power": lambda draw, c: "Well, " + any_style(draw, c),
        "security": lambda draw, c: "Well " + any_style(draw, c),
    }
    negated = {
        "power": lambda draw, c: "Never " + any_style(draw, c),
        "security": lambda draw, c: "Ponder " + any_style(draw, c),
    }
    for texts, name in ((commas, "commas"), (negated, "negation words")):
        told = [drawn(seed, texts) for seed in (1, 2)]
        assert style.count_accuracy(*told) == 1
        assert {value: means[name] for value, means in style.mean_counts(told[0]).items()} == {
            "power": 1,
            "security": 0,
        }


# Planted repeats


def test_a_phrase_counts_once_a_reply_and_across_any_marks() -> None:
    two = sound(0, power="Go on and on and on and on and on.", security="And go on, and on and on.")
    assert lint.repeated_phrases([two], 5, 1) == {"go on and on and": [("s0", "power"), ("s0", "security")]} | {
        "on and on and on": [("s0", "power"), ("s0", "security")]
    }
    assert lint.repeated_phrases([two], 5, 2) == {}


def test_a_phrase_that_two_splits_share_is_found() -> None:
    train = [Scenario("May we walk by the old mill?", {"power": "Lead the walk.", "security": "Take a map."}, id="t")]
    test = [Scenario("Why stay?", {"power": "To walk by the old mill.", "security": "For calm."}, id="e")]
    assert lint.shared_phrases(test, train, 5) == {"walk by the old mill": (("e", "power"), ("t", ""))}
    assert lint.shared_phrases(test, train, 5, questions=False) == lint.shared_phrases(test, train, 5)
    assert lint.shared_phrases(train, test, 5, questions=False) == {}
    assert lint.shared_phrases(test, train, 6) == {}


def test_a_text_with_few_words_changed_is_a_near_duplicate_in_any_split_and_block() -> None:
    draw = random.Random(0)
    contents = [f"{a}{b}{c}" for a, b, c in itertools.product("bdfgklmnprst", "aeiou", ["mber", "rrow", "ndle"])]
    many = [
        Scenario(
            " ".join(draw.choices(contents, k=20)), {v: " ".join(draw.choices(contents, k=20)) for v in TEXTS}, f"m{n}"
        )
        for n in range(150)
    ]
    assert lint.near_duplicates(many, similarity=0.7) == []
    words = many[3].replies["security"].split()
    words[4], words[11] = contents[7], contents[70]
    copy = [Scenario("Unlike all the rest?", {"power": " ".join(words), "security": "Short."}, "copy")]
    for pairs in (
        lint.near_duplicates([*many, *copy], similarity=0.7),
        lint.near_duplicates(many, copy, similarity=0.7),
    ):
        assert [pair[1:] for pair in pairs] == [(("m3", "security"), ("copy", "power"))]
        assert 0.7 < pairs[0][0] < 1
    ((alike, _, _),) = lint.near_duplicates(copy, copy[:1], similarity=0.999)[:1]
    assert alike == pytest.approx(1)


# Without scikit-learn


@pytest.fixture
def _no_sklearn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"] or ["sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "sklearn", None)


@pytest.mark.usefixtures("_no_sklearn")
@pytest.mark.parametrize(
    "measure",
    [
        lambda some: lint_scenarios(some),
        lambda some: style.mask_content("A word."),
        lambda some: lint.near_duplicates(some),
        lambda some: style.style_accuracy(some, some),
        lambda some: style.count_accuracy(some, some),
    ],
    ids=["lint", "mask", "duplicates", "style", "counts"],
)
def test_without_scikit_learn_the_extra_is_named(measure: Any) -> None:
    with pytest.raises(NeVAError, match=r'scikit-learn, which is not installed: `pip install "neva-hf\[scenarios\]"`'):
        measure([sound(0), sound(1)])


@pytest.mark.usefixtures("_no_sklearn")
def test_without_scikit_learn_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("neva_hf.scenarios.lint_again", lint.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert [one.rule for one in again.lint_scenarios([sound(power="Never.")], min_replies=1, similarity=None)] == [
        "length",
        "negation",
    ]
