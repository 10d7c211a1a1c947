"""What is refused of a repository on the Hub when PEFT loads a map from it, which then reads the files itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import USER, Hub, a_hub
from huggingface_hub import hf_api
from peft import PeftModel
from test_safe_loading import Opened
from tiny import random_map, tiny_model

from neva_hf import NeuronMap, NeVAError, NeVAModel

REPO = f"{USER}/neva-map"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with a_hub(monkeypatch, tmp_path_factory.mktemp("cache")) as running:
        # (what PEFT asks whether a file exists; it took its address when huggingface_hub was imported)
        monkeypatch.setattr(hf_api.api, "endpoint", running.url)
        random_map(tiny_model()).push_to_hub(REPO)
        yield running


LOADERS = {
    "NeVAModel": lambda: NeVAModel.from_pretrained(tiny_model(), REPO),
    "PeftModel": lambda: PeftModel.from_pretrained(tiny_model(), REPO),
}
each_loader = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


@each_loader
def test_a_sound_map_loads_from_the_hub(load: Any, hub: Hub) -> None:
    assert NeuronMap.from_model(load()).modules == random_map(tiny_model()).modules


@each_loader
def test_weights_that_are_none_are_refused(load: Any, hub: Hub) -> None:
    hub.commit(REPO, {WEIGHTS: hub.files(REPO)[WEIGHTS][:-4]})
    with pytest.raises(NeVAError, match="is not a sound safetensors file"):
        load()


@each_loader
def test_a_pickle_in_place_of_the_weights_is_never_read(
    load: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEVA_TEST_MARK", str(tmp_path / "was run"))
    torch.save({"x": Opened()}, tmp_path / "pickle")
    hub.commit(REPO, {WEIGHTS: None, "adapter_model.bin": (tmp_path / "pickle").read_bytes()})
    before = hub.count("GET", "adapter_model.bin")
    with pytest.raises(NeVAError, match="There is no neuron map in the repository"):
        load()
    assert hub.count("GET", "adapter_model.bin") == before
    assert not os.path.exists(tmp_path / "was run")


@each_loader
def test_strange_fields_are_refused_by_name(load: Any, hub: Hub) -> None:
    hub.commit(REPO, {CONFIG: hub.files(REPO)[CONFIG].replace(b'"use_gain"', b'"auto_map": {}, "use_gain"')})
    with pytest.raises(NeVAError, match="does not know: auto_map"):
        load()
