"""The model card: what is in it, what of its owner's stays in it, and that a stranger's text does nothing in it."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hub_server import USER, Hub, a_hub
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny import SCENARIOS, TEXTS, VALUES, random_map, tiny_reader, tiny_tokenizer
from typer.testing import CliRunner

from neva_hf import NeuronMap, NeVAError, load_value_system
from neva_hf.baselines import from_model
from neva_hf.card import CardOptions, Report, make_card, merge, split, template, write_card
from neva_hf.card_text import escape, fill, free_text
from neva_hf.cli import app
from neva_hf.evaluation import evaluate, write_report
from neva_hf.evaluation.kept import map_fingerprint
from neva_hf.hub import push_to_hub

REPO = f"{USER}/neva-map"
PARTS = ("title", "use", "values", "results", "neurons", "provenance", "mark")
BASE = "someone/tiny-llama-instruct"
TINY = tiny_reader()


def a_map(**config: Any) -> NeuronMap:
    config.setdefault("base_model_name_or_path", BASE)
    config.setdefault("ranges", {value: [-2.5, 2.0] for value in VALUES})
    return random_map(TINY, **config)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What `evaluate` finds about [`a_map`], with pictures that were never drawn."""
    neuron_map, base = a_map(), tiny_reader()
    found = evaluate(
        [from_model(neuron_map.apply_to(base))], base, tiny_tokenizer(), SCENARIOS, neutral_texts=TEXTS, samples=20,
        system=load_value_system(), about={"map": {"name": "a map", "fingerprint": map_fingerprint(neuron_map)}},
    )  # fmt: skip
    pictures = {"leakage_matrix_plus_1.png": "Ten rows | ten columns", "dose_curves.png": "Curves <that> rise"}
    return json.loads(json.dumps({**found, "pictures": pictures}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return a_map().save_pretrained(tmp_path / "map")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with a_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as running:
        yield running


class Elements(HTMLParser):
    """The elements of a page, and where its links go."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.targets += [value or "" for name, value in attrs if name in ("href", "src")]


def rendered(card: str) -> Elements:
    """What is in the page that a card's body becomes, HTML allowed."""
    elements = Elements()
    elements.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(split(card)[1]))
    return elements


def columns(card: str) -> list[list[int]]:
    """Of each table, how many columns its lines have."""
    blocks = re.findall(r"(?:^\|.*\n)+", split(card)[1], re.MULTILINE)
    return [[re.sub(r"\\.", "", line).count("|") for line in block.splitlines()] for block in blocks]


# What is in it.


def test_the_template_comes_with_the_package_and_has_every_part() -> None:
    assert re.findall(r"<!-- neva:begin ([a-z]+) -->", template()) == list(PARTS)
    for heading in ("Intended use", "Limits and misuse", "Citation"):
        assert f"\n## {heading}\n" in template()


def test_a_card_without_a_report_says_what_the_map_itself_knows() -> None:
    calibration = {
        "power": {"+1": {"kl": 0.0497, "perplexity_ratio": 1.04}, "-1": {"kl": 0.0512, "perplexity_ratio": 1.1}}
    }
    neuron_map = a_map(measurements={"calibration": calibration}, provenance={"method": "by hand", "seed": 7})
    card = make_card(neuron_map)
    assert "| `power` |  | -2.5 | +2 | 0.051 | 0.050 | 12 |" in card
    assert "| `power` | 1.10 | 1.04 |" in card
    assert "has not been evaluated on unseen scenarios" in card
    assert "| seed | 7 |" in card
    assert f"[{BASE}](https://huggingface.co/{BASE})" in card
    for name, edits in neuron_map.modules.items():
        assert f"| {escape(name)} | {edits.index.numel()} | " in card


def test_metadata_is_what_the_hub_reads() -> None:
    options = CardOptions(REPO, license="cc-by-4.0", datasets=["tester/scenarios"])
    data = ModelCard(make_card(a_map(value_system=load_value_system().to_dict()), options=options)).data.to_dict()
    assert data["library_name"] == "neva-hf"
    assert (data["base_model"], data["base_model_relation"]) == (BASE, "adapter")
    assert data["pipeline_tag"] == "text-generation"
    assert {"neva-hf", "peft", "human-values", "schwartz"} <= set(data["tags"])
    assert (data["license"], data["datasets"]) == ("cc-by-4.0", ["tester/scenarios"])
    assert "model-index" not in data


def test_tables_and_metadata_have_the_numbers_of_the_report(report: dict[str, Any]) -> None:
    card = make_card(a_map(), Report(report), options=CardOptions(REPO))
    for side, found in next(iter(report["methods"].values()))["strengths"].items():
        low, high = found["target"][1:]
        assert f"| **this map** (NeVA) | {side} | {found['target'][0]:+.3f} [{low:+.3f}, {high:+.3f}] |" in card
        kl = found["damage"]["values"]["power"]["kl"]
        assert f"| {kl[0]:.3f} [{kl[1]:.3f}, {kl[2]:.3f}] |" in card
    results = {result.metric_name: result for result in ModelCard(card).data.eval_results}
    up = next(iter(report["methods"].values()))["strengths"]["+1"]
    shift = results["Target margin shift at +1 (nats per token)"]
    assert shift.metric_value == round(up["target"][0], 4)
    assert shift.metric_args == {"interval_95": [round(end, 4) for end in up["target"][1:]]}
    assert results["KL divergence on neutral text at -1 (nats per token)"].dataset_split == "test"
    assert ModelCard(card).data.to_dict()["model-index"][0]["name"] == "neva-map"


def test_a_values_name_has_no_backslash_in_code(report: dict[str, Any]) -> None:
    told = json.loads(json.dumps(report).replace("benevolence", "self_direction"))
    body = split(make_card(a_map(), Report(told)))[1]
    assert "| `self_direction` | " in body
    assert re.search(r"\| [+-]\d\.\d{3} `[a-z_]+` \|", body)
    assert not re.findall(r"`[a-z_]*\\\\[^`]*`", body)


def test_numbers_that_a_reader_would_take_for_mistakes_are_explained(report: dict[str, Any]) -> None:
    cost = {"tokens": 3066, "ratio": 1.0612, "base_perplexity": 26.964, "kl": 0.0584}
    dose = {"source": "the map", "scenarios": 4, "texts": 6}
    other = {**next(iter(report["methods"].values())), "scalable": False}
    told = {
        **report, "methods": {**report["methods"], "CAA": other, "My <own>": other}, "dose": dose,
        "wikitext": {"methods": {"NeVA": cost}},
    }  # fmt: skip
    card = make_card(a_map(), Report(told, "", set(report["pictures"])))
    for words in (
        "and may leave the number itself out",
        "At -1, where falls count as rises:",
        "were measured when the map was made, on 4 other questions and 6 other texts, so their numbers differ "
        "from those of the tables.\n\n![Curves",
        "On 3,066 tokens of WikiText at +1, the mean over the dialled values: perplexity 1.061 times the base model's (26",
        "CAA ([contrastive activation addition](https://arxiv.org/abs/2312.06681); cannot be scaled to that divergence)",
        ", My &lt;own&gt; (cannot be scaled to that divergence).",
    ):
        assert words in card
    plain = make_card(a_map(), Report(report))
    for words in ("Beside it", "WikiText", "The curves over the strength"):
        assert words not in plain


def test_code_blocks_of_a_card_do_not_need_each_others_base_model() -> None:
    """PEFT edits a base model in place: what loads the stock adapter onto an edited one would say something else."""
    stock = next(
        block for block in re.findall(r"```python\n(.*?)```", make_card(a_map()), re.DOTALL) if '"my-adapter"' in block
    )
    assert "AutoModelForCausalLM.from_pretrained" in stock
    assert "neva_hf" not in stock.replace("neva-hf", "")


def test_what_a_search_noted_is_told_in_words_with_units() -> None:
    noted = {"neurons": 12, "target_kl": 0.05, "method": "neva"}
    card = make_card(a_map(provenance=noted, base={"name": BASE, "hidden_size": 64}))
    assert "| neurons per value | 12 |" in card
    assert "| KL divergence at strength 1 (nats per token) | 0.05 |" in card
    assert "| method | neva |" in card
    assert "| name |" not in card


def test_only_pictures_that_are_there_are_shown_with_their_words(report: dict[str, Any]) -> None:
    card = make_card(a_map(), Report(report, "report/", {"dose_curves.png", "other.png"}))
    assert "![Curves &lt;that&gt; rise](report/dose_curves.png)" in card
    assert "leakage_matrix_plus_1.png" not in card
    assert "other.png" not in card
    assert "[`report.json`](report/report.json)" in card


def test_a_report_of_another_map_is_refused(report: dict[str, Any]) -> None:
    with pytest.raises(NeVAError, match=r"report\.json is about another map"):
        make_card(random_map(TINY, seed=5), Report(report))


def test_code_names_the_repository_and_the_subfolder() -> None:
    card = make_card(a_map(), options=CardOptions(REPO, "maps/one"))
    assert f'NeVAModel.from_pretrained("{REPO}", subfolder="maps/one")' in card
    assert f"neva export stock {REPO} my-adapter --strengths benevolence=1.5" in card
    assert f'AutoModelForCausalLM.from_pretrained("{BASE}")' in card


def test_the_card_shows_no_strength_beyond_the_fluent_range() -> None:
    card = make_card(a_map(ranges={"benevolence": [-0.5, 0.75]}))
    assert 'strengths={"benevolence": 0.75}' in card


def test_a_map_with_gates_is_not_said_to_have_a_stock_export() -> None:
    assert "neva export" not in make_card(a_map(gate=True))


def test_a_map_with_gains_is_said_to_need_two_files_in_llama_cpp_and_one_adapter_elsewhere() -> None:
    card = make_card(a_map(gain=True, base={"model_type": "llama"}))
    assert "neva export stock" in card
    assert "a control vector for llama.cpp, and a LoRA adapter beside it" in card
    assert "LoRA" not in make_card(a_map(base={"model_type": "llama"}))


def test_a_card_says_what_an_edit_is_where_there_are_gains() -> None:
    assert "An edit is a shift and a gain" in make_card(a_map(gain=True))
    assert "An edit is a shift" not in make_card(a_map())


@pytest.mark.parametrize(("model_type", "is_exact"), [("llama", True), ("gemma3_text", False)])
def test_a_control_vector_is_named_only_where_it_is_exact(model_type: str, is_exact: bool) -> None:
    card = make_card(a_map(base={"model_type": model_type}))
    assert ("`neva export gguf` writes a control vector" in card) == is_exact
    assert ("A control vector for llama.cpp is not known to be exact" in card) != is_exact


def test_dials_that_loading_turns_are_said_plainly() -> None:
    assert "**Loading this map turns dials:** `power` -1.5." in make_card(a_map(default_strengths={"power": -1.5}))


# What its owner wrote stays.


def test_a_card_written_again_is_the_same(report: dict[str, Any]) -> None:
    card = make_card(a_map(), Report(report), options=CardOptions(REPO, license="mit"))
    assert make_card(a_map(), Report(report), card, CardOptions(REPO)) == card


def test_words_outside_the_parts_stay_and_words_inside_are_written_anew() -> None:
    card = make_card(a_map()).replace("## Intended use\n", "## Intended use\n\nFor my thesis.\n")
    card = card.replace("<!-- neva:end values -->", "Lost.\n<!-- neva:end values -->") + "\nLast words.\n"
    again = make_card(a_map(ranges={"power": [-1.0, 1.25]}), existing=card)
    assert "For my thesis." in again
    assert "Last words." in again
    assert "Lost." not in again
    assert "| `power` |  | -1 | +1.25 |" in again


def test_a_part_that_was_removed_stays_out() -> None:
    card = make_card(a_map())
    start, end = card.index("## Where the neurons are"), card.index("## How it was made")
    again = make_card(a_map(), existing=card[:start] + card[end:])
    assert "down projection" not in again


def test_a_card_without_markers_is_kept_word_for_word_and_gets_the_metadata() -> None:
    again = make_card(a_map(), existing="---\nlicense: mit\n---\n# Mine\n\nAll my own words.\n")
    metadata, body = split(again)
    assert body == "# Mine\n\nAll my own words."
    assert (metadata["license"], metadata["library_name"]) == ("mit", "neva-hf")


def test_metadata_of_the_owner_stays(report: dict[str, Any]) -> None:
    own = {
        "license": "mit", "language": ["en", "de"], "tags": ["mine"], "datasets": ["a/b"], "widget": [{"text": "Hi"}],
        "model-index": [{"name": "mine", "results": [{"task": {"type": "text-generation"}, "dataset": {"type": "mmlu",
        "name": "MMLU"}, "metrics": [{"type": "accuracy", "value": 0.25}]}]}],
    }  # fmt: skip
    again, _ = split(make_card(a_map(), Report(report), f"---\n{json.dumps(own)}\n---\n"))
    assert (again["license"], again["language"], again["widget"]) == ("mit", ["en", "de"], [{"text": "Hi"}])
    assert "mine" in again["tags"]
    assert "neva-hf" in again["tags"]
    assert again["datasets"] == ["a/b"]
    results = again["model-index"][0]["results"]
    assert [one["dataset"]["type"] for one in results] == ["mmlu", "neva-scenarios"]


def test_the_empty_card_of_peft_is_replaced(tmp_path: Path) -> None:
    model = a_map().apply_to(tiny_reader())
    model.save_pretrained(tmp_path / "map")
    assert "[More Information Needed]" in (tmp_path / "map" / "README.md").read_text()
    text = write_card(tmp_path / "map").read_text()
    assert "More Information Needed" not in text
    assert "## Intended use" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- neva:begin use -->\n", r"the part 'use' has no `<!-- neva:end use -->`"),
        ("<!-- neva:end use -->\n", r"`<!-- neva:end use -->` stands where a neva:begin was expected"),
        ("<!-- neva:begin use -->\n<!-- neva:begin title -->\n", r"stands where a neva:end was expected"),
        ("<!-- neva:begin use -->\n<!-- neva:end use -->\n" * 2, r"the part 'use' stands in it twice"),
        ("---\n- a\n---\n", r"must be names with values"),
        ("---\na: [\n---\n", r"cannot be read"),
    ],
)
def test_a_card_that_cannot_be_written_anew_says_what_to_mend(folder: Path, text: str, message: str) -> None:
    (folder / "README.md").write_text(text)
    with pytest.raises(NeVAError, match=message):
        write_card(folder)
    assert (folder / "README.md").read_text() == text


# Two cards at once.


def edited(card: str, words: str) -> str:
    return card.replace("## Intended use\n", f"## Intended use\n\n{words}\n")


def test_whoever_edited_the_card_since_the_last_push_is_right() -> None:
    pushed = make_card(a_map())
    here, there = edited(pushed, "Here."), edited(pushed, "There.")
    for local, remote, wanted in ((here, pushed, here), (pushed, there, there), (here, here, here)):
        merged = merge(local, remote)
        assert merged is not None
        assert free_text(merged.split("---\n", 2)[2]) == free_text(wanted.split("---\n", 2)[2])


def test_a_card_edited_on_both_sides_is_refused() -> None:
    pushed = make_card(a_map())
    with pytest.raises(NeVAError, match=r"README\.md was edited here and on the Hub as well, each differently"):
        merge(edited(pushed, "Here."), edited(pushed, "There."))


def test_what_was_pushed_from_here_does_not_count_as_an_edit_there() -> None:
    first = edited(make_card(a_map()), "First.")
    pushed = make_card(a_map(), existing=first)
    second = first.replace("First.", "Second.")
    assert "Second." in (merge(second, pushed) or "")
    assert "There." in (merge(first, pushed.replace("First.", "There.")) or "")


def test_one_card_or_none_needs_no_merging() -> None:
    assert merge(None, None) is None
    assert split(merge("# Mine", None))[1] == split(merge(None, "# Mine"))[1] == "# Mine"


# Through the Hub.


def text_of(hub: Hub) -> str:
    return hub.files(REPO)["README.md"].decode()


def test_an_edit_on_the_hub_survives_a_second_push(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, REPO)
    hub.commit(REPO, {"README.md": edited(text_of(hub), "Written on the web.").encode()})
    a_map(ranges={"power": [-1.0, 1.25]}).save_pretrained(folder)
    push_to_hub(folder, REPO)
    assert "Written on the web." in text_of(hub)
    assert "| `power` |  | -1 | +1.25 |" in text_of(hub)
    push_to_hub(NeuronMap.from_pretrained(folder), REPO)
    assert "Written on the web." in text_of(hub)


def test_an_edit_here_survives_every_push(hub: Hub, folder: Path) -> None:
    card = write_card(folder)
    for words in ("First words.", "Second words."):
        card.write_text(edited(card.read_text(), words))
        push_to_hub(folder, REPO)
        assert words in text_of(hub)
    assert "First words." in text_of(hub)


def test_edits_on_both_sides_stop_the_push_and_lose_nothing(hub: Hub, folder: Path) -> None:
    push_to_hub(folder, REPO)
    hub.commit(REPO, {"README.md": edited(text_of(hub), "There.").encode()})
    write_card(folder).write_text(edited((folder / "README.md").read_text(), "Here."))
    before = hub.files(REPO)
    with pytest.raises(NeVAError, match="edited here and on the Hub"):
        push_to_hub(folder, REPO)
    assert hub.files(REPO) == before
    assert "Here." in (folder / "README.md").read_text()


def test_without_a_card_the_readme_goes_as_it_is(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("As it is.")
    push_to_hub(folder, REPO, card=False)
    assert text_of(hub) == "As it is."


def test_a_report_in_the_repository_is_kept_for_the_same_map_and_goes_with_another(
    hub: Hub,
    folder: Path,
    report: dict[str, Any],
) -> None:
    write_report(report, folder / "report", pictures=False)
    (folder / "report" / "leakage_matrix_plus_1.png").write_bytes(b"drawn")
    told = json.loads((folder / "report" / "report.json").read_text())
    (folder / "report" / "report.json").write_text(json.dumps({**told, "pictures": report["pictures"]}))
    push_to_hub(folder, REPO)
    pushed = text_of(hub)
    assert "![Ten rows \\| ten columns](report/leakage_matrix_plus_1.png)" in pushed
    push_to_hub(a_map(), REPO)
    assert text_of(hub) == pushed
    push_to_hub(random_map(TINY, seed=5, base_model_name_or_path=BASE), REPO)
    assert "has not been evaluated" in text_of(hub)
    assert not [name for name in hub.files(REPO) if name.startswith("report/")]


# A stranger's text.

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![i](https://evil.example/p.png)",
    "<!-- neva:end values -->\n\n# Owned",
    "a | b | c\n| --- |\n\n---\nlicense: mit\n---",
    "`code` **bold** _em_ ~~s~~ $$x$$",
    "https://evil.example www.evil.example me@evil.example",
    "\u202egnihtemos\u202c\x1b[2J\x00",
    "&lt;b&gt; &#60;script&#62;",
]


def hostile_maps(text: str) -> Iterator[NeuronMap]:
    system = copy.deepcopy(load_value_system().to_dict())
    for value in system["values"]:
        value["definition"] = value["label"] = text
    system["label"] = text
    configs: list[dict[str, Any]] = [
        {"value_system": system},
        {"provenance": {text: text, "nested": {text: [text, 1]}}},
        {"measurements": {"calibration": text, "dose": text}},
        {"base_model_name_or_path": text},
        {"base": {"model_type": text}},
        {"revision": text},
    ]
    # What is refused when a map is made needs no escaping.
    for config in configs:
        with contextlib.suppress(NeVAError):
            yield a_map(**config)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_strangers_text_is_nothing_but_text(text: str) -> None:
    plain = rendered(make_card(a_map()))
    for neuron_map in hostile_maps(text):
        card = make_card(neuron_map)
        elements = rendered(card)
        assert elements.tags <= plain.tags
        assert [target for target in elements.targets if "evil" in target or "javascript" in target] == []
        assert {len(set(cells)) for cells in columns(card)} == {1}
        assert re.findall(r"<!-- neva:begin ([a-z]+) -->", card) == list(PARTS)
        assert "# Owned" not in card.splitlines()
        assert not [sign for sign in card if not sign.isprintable() and sign != "\n"]
        metadata, _ = split(card)
        assert "license" not in metadata
        assert metadata.get("base_model") in (None, BASE)


def test_a_base_models_name_cannot_write_code_into_the_card() -> None:
    card = make_card(a_map(base_model_name_or_path='x/y"); import os; os.system("rm -rf ~") #'))
    code = "".join(re.findall(r"```\w+\n(.*?)```", card, re.DOTALL))
    assert "os.system" not in code
    assert 'AutoModelForCausalLM.from_pretrained("BASE-MODEL")' in code


def test_a_strangers_report_is_text_too(report: dict[str, Any]) -> None:
    for text in HOSTILE:
        told = copy.deepcopy(report)
        told["scenarios"] |= {"set": text, "split": text}
        told["pictures"] = {"dose_curves.png": text, text: "x", "../../up.png": "up"}
        told["methods"] = {text: next(iter(told["methods"].values()))}
        card = make_card(a_map(), Report(told, "", {"dose_curves.png", text, "../../up.png"}))
        elements = rendered(card)
        assert elements.tags <= rendered(make_card(a_map())).tags | {"img", "h3"}
        assert [target for target in elements.targets if target.endswith(".png")] == ["dose_curves.png"]
        assert "license" not in split(card)[0]


def every_place(found: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if len(path) < 5 and isinstance(found, (dict, list)):
        for key in found if isinstance(found, dict) else range(min(len(found), 2)):
            yield from every_place(found[key], (*path, key))


def test_a_report_with_anything_in_any_place_ends_in_a_card_or_our_error(report: dict[str, Any]) -> None:
    neuron_map, refused = a_map(), 0
    for path in every_place(report):
        for broken in (None, "x", [-1], 10**400):
            told = copy.deepcopy(report)
            place = told
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = broken
            try:
                make_card(neuron_map, Report(told, "", {"dose_curves.png"}))
            except NeVAError:
                refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "wrong", [{"repo_id": "a b"}, {"license": "Free For All\n"}, {"datasets": ["ok/ok", "not ok"]}], ids=str
)
def test_options_that_cannot_stand_in_a_card_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(NeVAError, match=r"cannot be the id of a repository|is no license"):
        CardOptions(**wrong)


# Pieces, and the command.


def test_parts_that_nobody_gives_stay_as_they_are() -> None:
    text = "<!-- neva:begin a -->\nold\n<!-- neva:end a -->\n<!-- neva:begin b -->\nold\n<!-- neva:end b -->"
    assert fill(text, {"b": "new"}) == text[: text.index("b -->")] + "b -->\nnew\n<!-- neva:end b -->"


def test_the_command_writes_the_card_and_keeps_what_was_written(folder: Path) -> None:
    for words in ("", "More."):
        done = CliRunner().invoke(app, ["card", str(folder), "--license", "apache-2.0", "--repo", REPO])
        assert done.exit_code == 0, done.output
        text = (folder / "README.md").read_text()
        assert f'from_pretrained("{REPO}")' in text
        assert words in text
        (folder / "README.md").write_text(edited(text, "More."))
    failed = CliRunner().invoke(app, ["card", str(folder / "none")])
    assert failed.exit_code == 1
    assert "There is no folder" in failed.stderr
