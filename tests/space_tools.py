"""Tiny engines for the tests of the Space."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tiny import random_map, tiny_reader, tiny_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from neva_hf import NeuronMap, NeVAModel
from neva_hf.space.engine import Engine
from neva_hf.space.limits import Limits

CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DIALS = {"benevolence": 1.5, "power": -1.0}


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    found = tiny_tokenizer(pad_token="<|end|>")
    if chat:
        found.chat_template = CHAT
    return found


def base_model(architecture: str = "llama", **overrides: Any) -> PreTrainedModel:
    return tiny_reader(architecture, **{"max_position_embeddings": 2048, **overrides})


def tiny_engine(
    architecture: str = "llama", chat: bool = True, limits: Limits | None = None, **map_options: Any
) -> Engine:
    base = base_model(architecture)
    return Engine.of(base, tokenizer(chat), random_map(base, **map_options), limits=limits)


def saved(folder: Path, chat: bool = True, **map_options: Any) -> tuple[Path, Path]:
    """A base model and its map as folders; the map names the base."""
    base = base_model()
    base.save_pretrained(folder / "base")
    tokenizer(chat).save_pretrained(folder / "base")
    named = str(folder / "base")
    random_map(base, base_model_name_or_path=named, **map_options).save_pretrained(folder / "map")
    return folder / "base", folder / "map"


def twin(engine: Engine) -> NeVAModel:
    """The same model once more, sharing nothing with the engine."""
    return NeVAModel.from_map(base_model(), NeuronMap(engine.map.config, engine.map.modules))


def last(turns: Iterable[Any]) -> Any:
    *_, found = turns
    return found


def idle(engine: Engine) -> None:
    """Waits until everything that was asked before is over."""
    engine._shared.worker.submit(lambda: None).result(timeout=60)
