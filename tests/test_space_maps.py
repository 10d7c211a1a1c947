"""Maps that visitors bring: from the Hub alone, through the safe loader, and onto the page's own base model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import USER, Hub, a_hub
from space_tools import DIALS, base_model, last, tiny_engine, tokenizer
from tiny import random_map, tiny_model

from neva_hf import NeuronMap, NeVAError, load_value_system
from neva_hf.space import maps
from neva_hf.space.engine import Engine
from neva_hf.space.limits import Limits

REPO = f"{USER}/neva-map"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUESTION = "What now?"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with a_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as running:
        random_map(base_model(), seed=9, base_model_name_or_path="HuggingFaceTB/Other").push_to_hub(REPO)
        yield running


def asked(engine: Engine) -> tuple[str, str]:
    turn = last(engine.stream([], QUESTION, DIALS, max_new_tokens=10))
    return turn.base, turn.edited


def test_a_visitors_map_is_dialled_on_the_same_base_model(hub: Hub) -> None:
    own = tiny_engine()
    theirs = own.for_map(REPO)
    alone = Engine.of(base_model(), tokenizer(), random_map(base_model(), seed=9))
    before = asked(own)
    assert asked(theirs) == asked(alone)
    assert asked(own) == before
    assert before[0] == asked(theirs)[0]
    assert before[1] != asked(theirs)[1]
    assert (theirs.name, theirs.source, theirs.visiting, own.visiting) == (REPO, REPO, True, False)
    assert "was made for HuggingFaceTB/Other" in theirs.notice


def test_maps_share_the_weights_and_the_line(hub: Hub) -> None:
    own = tiny_engine()
    theirs = own.for_map(REPO)
    ours = {id(parameter) for parameter in own.base.parameters()}
    shared = [parameter for parameter in theirs.model.parameters() if id(parameter) in ours]
    assert len(shared) == len(ours)
    assert theirs._shared is own._shared
    # And the base model itself has no edit in it.
    assert not [name for name, _ in own.base.named_modules() if "base_layer" in name]


@pytest.mark.parametrize("name", [f"https://huggingface.co/{REPO}", f"http://hf.co/{REPO}/", f" {REPO} "])
def test_a_repository_may_be_named_by_its_address(name: str, hub: Hub) -> None:
    assert tiny_engine().for_map(name).name == REPO


@pytest.mark.parametrize(
    "name",
    [
        "some-map", "/etc/passwd", "../user/map", "user/../map", "a/b/c", "./map", "C:\\map",
        "user/ma p", "user/<b>", "-x/y",
        "https://example.com/user/map", "https://huggingface.co/spaces/user/map", "user/map?x=1", "user/" + "a" * 300,
    ],
)  # fmt: skip
def test_what_is_no_repository_is_refused_before_anything_is_asked_or_opened(name: str, hub: Hub) -> None:
    before = len(hub.requests)
    with pytest.raises(NeVAError, match=r"This is no repository on the Hugging Face Hub. Write it as user/name.$"):
        tiny_engine().for_map(name)
    assert len(hub.requests) == before


def test_nothing_and_the_pages_own_map_are_the_page_itself() -> None:
    engine = tiny_engine()
    assert engine.for_map("") is engine.for_map(" ") is engine.for_map(engine.name) is engine


def test_a_folder_of_that_name_is_not_opened(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_map(base_model()).save_pretrained(tmp_path / "some" / "folder")
    with pytest.raises(NeVAError, match="The Hub has no public repository some/folder"):
        tiny_engine().for_map("some/folder")


def test_private_repositories_of_the_pages_owner_stay_private(hub: Hub) -> None:
    random_map(base_model()).push_to_hub(f"{USER}/private-map", private=True)
    # (the owner's token opens it)
    assert NeuronMap.from_pretrained(f"{USER}/private-map").values
    with pytest.raises(NeVAError, match="private and gated ones cannot be read here"):
        tiny_engine().for_map(f"{USER}/private-map")


def test_a_map_that_does_not_fit_is_a_sentence_that_names_both(hub: Hub) -> None:
    other = tiny_model(hidden_size=16)
    random_map(other).push_to_hub(f"{USER}/other")
    with pytest.raises(NeVAError) as caught:
        tiny_engine().for_map(f"{USER}/other")
    sentence = str(caught.value)
    assert sentence.startswith(f"The map {USER}/other does not fit ")
    assert "hidden_size is 32, the map needs 16" in sentence


def test_a_map_of_neurons_that_are_not_there_does_not_fit(hub: Hub) -> None:
    neuron_map = random_map(base_model(), base=None)
    next(iter(neuron_map.modules.values())).index[0] = 64
    neuron_map.push_to_hub(f"{USER}/wide")
    with pytest.raises(NeVAError, match=r"does not fit .* it edits neuron 64 of .*, which has only 64"):
        tiny_engine().for_map(f"{USER}/wide")


def test_a_damaged_map_is_refused(hub: Hub) -> None:
    hub.commit(REPO, {WEIGHTS: hub.files(REPO)[WEIGHTS][:-4]})
    with pytest.raises(NeVAError, match="not a sound safetensors file"):
        tiny_engine().for_map(REPO)


def test_a_repository_without_a_map_is_refused(hub: Hub) -> None:
    hub.commit(REPO, {CONFIG: None})
    with pytest.raises(NeVAError, match="holds no neuron map"):
        tiny_engine().for_map(REPO)


def test_a_large_map_is_weighed_and_not_fetched(hub: Hub) -> None:
    random_map(base_model(), neurons=60, gain=True).push_to_hub(REPO)
    size = len(hub.files(REPO)[WEIGHTS])
    assert size > len(hub.files(REPO)[CONFIG])
    before = hub.count("GET", WEIGHTS)
    with pytest.raises(NeVAError, match="was not fetched"):
        tiny_engine(limits=Limits(map_bytes=size - 1)).for_map(REPO)
    assert hub.count("GET", WEIGHTS) == before
    assert tiny_engine(limits=Limits(map_bytes=size)).for_map(REPO)


def test_a_map_of_very_many_values_is_refused(hub: Hub) -> None:
    with pytest.raises(NeVAError, match="has 3 values; this page shows 2 at most"):
        tiny_engine(limits=Limits(values=2)).for_map(REPO)


def test_nothing_of_a_visitors_map_stays_on_the_disk(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps.tempfile, "tempdir", str(tmp_path))
    tiny_engine().for_map(REPO)
    assert list(tmp_path.iterdir()) == []


def test_the_last_few_maps_are_kept_in_memory(hub: Hub) -> None:
    names = [f"{USER}/map-{number}" for number in range(3)]
    for name in names:
        random_map(base_model()).push_to_hub(name)
    engine = tiny_engine(limits=Limits(maps=2))
    first, second = engine.for_map(names[0]), engine.for_map(names[1])
    assert engine.for_map(names[0]) is first
    assert first.for_map(names[1]) is second
    engine.for_map(names[2])
    assert engine.for_map(names[1]) is second
    before = hub.count("GET", WEIGHTS)
    assert engine.for_map(names[0]) is not first
    assert hub.count("GET", WEIGHTS) == before + 1


def test_texts_of_a_strangers_value_system_are_cut_to_one_short_line() -> None:
    system = load_value_system("schwartz10").to_dict()
    system["values"][0]["label"] = "a\n\x1b[2Jb\u202e" + "c" * 500
    system["values"][0]["definition"] = "d" * 5000
    engine = tiny_engine(value_system=system)
    value = engine.system.values[0]
    assert value.label.startswith("a [2Jb cc")
    assert len(value.label) == 60
    assert len(value.definition) == 400


@pytest.mark.parametrize("system", [{"name": 3}, {"values": []}, load_value_system("big_five").to_dict()])
def test_definitions_that_are_not_sound_or_of_other_values_are_not_used(system: dict[str, object]) -> None:
    engine = tiny_engine(value_system=system)
    assert engine.system.name == "schwartz10"
    assert engine.values == ["power", "security", "benevolence"]


def test_absurd_ranges_are_cut_to_what_a_dial_can_show() -> None:
    engine = tiny_engine(ranges={"power": [-1e6, 1e6], "security": [0.0, 0.0]})
    assert engine.ranges == {"benevolence": (-2.0, 2.0), "power": (-8.0, 8.0), "security": (0.0, 0.0)}
    assert engine.reach == 8.0
    assert tiny_engine(ranges={name: [0.0, 0.0] for name in engine.values}).reach == 2.0


def test_the_published_map_is_found_where_the_package_or_the_checkout_has_it() -> None:
    neuron_map = NeuronMap.from_pretrained(maps.default_map())
    assert set(neuron_map.values) == set(load_value_system("schwartz10").names)
