"""The model of the page: a map on its base model, and both answers from one batch.

Invariants: nothing of a visitor is kept in an engine; dials live in the call, one set per row; row 0 is the base model.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neva_hf.architectures import text_config
from neva_hf.base import load_base
from neva_hf.errors import NeVAError
from neva_hf.export.fixed import bare_twin
from neva_hf.model import NeVAModel
from neva_hf.neuron_map import NeuronMap
from neva_hf.values import ValueSystem

from .ask import History, checked_dials, checked_sampling, checked_texts, prompt_ids
from .limits import Limits, Worker
from .maps import check_fit, default_map, map_of_visitor, ranges_of, reach_of, repo_of, short_path, system_of
from .rows import Rows, Sampling, generate_rows, read_rows
from .state import Dials
from .turn import Exchange, Turn, as_turns, sides

__all__ = ["Engine", "Exchange", "Turn"]


@dataclass
class _Shared:
    """What all engines of a page have in common."""

    base: Any
    tokenizer: Any
    base_name: str
    worker: Worker
    limits: Limits
    # A fast tokenizer must not be used by two threads at once.
    reading: threading.Lock = field(default_factory=threading.Lock)
    visitors: OrderedDict[str, Engine] = field(default_factory=OrderedDict)
    visiting: threading.Lock = field(default_factory=threading.Lock)


class Engine:
    """A base model with one neuron map, for all visitors. Made by [`Engine.load`] and [`Engine.for_map`].

    Attributes:
        name (`str`): What people call the map.
        source (`str`): What `NeVAModel.from_pretrained` takes to load it; the name of a map that came with neva-hf.
        shipped (`bool`): Whether the map came with neva-hf, so that everybody who has that has it.
        base_name (`str`): The base model.
        map ([`NeuronMap`]): The map.
        values (`list[str]`): Its dials, in the order of the circle.
        system ([`ValueSystem`]): What they mean; it may have more values than the map. A stranger's texts: escape them.
        ranges (`dict[str, tuple[float, float]]`): How far each stays fluent.
        reach (`float`): How far dials may be turned at all, to either side.
        has_gate (`bool`): Whether the map has gates.
        visiting (`bool`): Whether the map is a visitor's, and not the page's own.
        notice (`str`): A sentence that whoever uses the map should read, or nothing.
        limits ([`Limits`]): What a call may ask for.
    """

    def __init__(self, shared: _Shared, neuron_map: NeuronMap, name: str, source: str, visiting: bool = False) -> None:
        self._shared = shared
        self.name, self.source, self.visiting, self.shipped = name, source, visiting, False
        # Dials are turned by visitors alone, and the page says itself what lies beyond the ranges.
        config = replace(copy.deepcopy(neuron_map.config), default_strengths={}, ranges={})
        self._quiet_map = NeuronMap(config, neuron_map.modules)
        self.map = neuron_map
        self.system: ValueSystem = system_of(neuron_map)
        self.values = [value for value in self.system.names if value in neuron_map.values]
        self.ranges = ranges_of(neuron_map)
        self.reach = reach_of(list(self.ranges.values()))
        self.has_gate = neuron_map.config.use_gate
        self.limits = shared.limits
        self.base_name = shared.base_name
        named = neuron_map.base_model
        # (a folder says nothing to a reader)
        other = named is not None and named != self.base_name and not Path(named).exists()
        self.notice = (
            f"This map was made for {named:.120}, but this page runs {self.base_name}: what it says of itself may not hold."
            if other
            else ""
        )

    @classmethod
    def load(
        cls,
        map_source: str | None = None,
        base: str | None = None,
        device: str | None = None,
        *,
        source: str | None = None,
        limits: Limits | None = None,
    ) -> Engine:
        """Loads a map that the owner of the page chose, and its base model.

        Args:
            map_source (`str`, *optional*): A folder, or a repository on the Hub; the published map when `None`.
            base (`str`, *optional*): A Hub id, a folder or a GGUF file; the base model that the map names when `None`.
            device (`str`, *optional*): Where to run; CUDA where there is one when `None`, else the CPU.
            source (`str`, *optional*): Where others find the map, for the code that they take home; where it was loaded
                from when `None`.
            limits ([`Limits`], *optional*): What a call may ask for.

        Returns:
            [`Engine`]: Ready to answer.

        Raises:
            `NeVAError`: If the map or the model cannot be had, or do not fit.
        """
        where = str(default_map()) if map_source is None else map_source
        neuron_map = NeuronMap.from_pretrained(where)
        if base is None and neuron_map.base_model is None:
            raise NeVAError("The neuron map does not name its base model: name it with base=... (--base).")
        same = base is None or base == neuron_map.base_model
        revision = neuron_map.config.revision if same else None
        model, tokenizer = load_base(base or neuron_map.base_model, revision=revision)
        name = Path(where).resolve().name if Path(where).exists() else where
        shipped = map_source is None and source is None
        found = source or (name if shipped else short_path(where))
        engine = cls.of(model, tokenizer, neuron_map, name=name, source=found, limits=limits)
        engine.shipped = shipped
        # Last of all: on ZeroGPU, what was moved has no numbers to read until a GPU is there.
        for part in (model, engine.model):
            part.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return engine

    @classmethod
    def of(
        cls,
        base: Any,
        tokenizer: Any,
        neuron_map: NeuronMap,
        *,
        name: str = "map",
        source: str = "USER/MAP",
        limits: Limits | None = None,
    ) -> Engine:
        """Makes an engine of a base model that is loaded, and not changed. See [`Engine.load`]."""
        limits = limits or Limits()
        base_name = str(getattr(base, "name_or_path", "") or neuron_map.base_model or "the base model")
        check_fit(base, neuron_map, f"The map does not fit {base_name}")
        engine = cls(_Shared(base, tokenizer, base_name, Worker(limits.waiting), limits), neuron_map, name, source)
        _ = engine.model  # what can go wrong goes wrong now
        return engine

    def for_map(self, repo_id: str) -> Engine:
        """An engine of a visitor's map on the same base model. It shares the weights, and the line to them.

        Args:
            repo_id (`str`): A repository on the Hub, or the address of its page. Nothing, or this engine's own name, is
                this engine.

        Returns:
            [`Engine`]: The last few are kept.

        Raises:
            `NeVAError`: If there is no such map, it is not sound, or does not fit the base model of this page.
        """
        if not repo_id.strip() or repo_id.strip() in (self.name, self.source):
            return self
        repo_id, shared = repo_of(repo_id), self._shared
        with shared.visiting:
            if repo_id in shared.visitors:
                shared.visitors.move_to_end(repo_id)
                return shared.visitors[repo_id]
        neuron_map = map_of_visitor(repo_id, shared.limits)
        check_fit(shared.base, neuron_map, f"The map {repo_id} does not fit {shared.base_name}, which this page runs")
        engine = Engine(shared, neuron_map, repo_id, repo_id, visiting=True)
        with shared.visiting:
            shared.visitors[repo_id] = engine
            while len(shared.visitors) > shared.limits.maps:
                shared.visitors.popitem(last=False)
        return engine

    @cached_property
    def model(self) -> NeVAModel:
        """The model. Made when it is first asked for: on ZeroGPU, only there are weights to read."""
        return NeVAModel.from_map(bare_twin(self._shared.base), self._quiet_map)

    @property
    def base(self) -> Any:
        """The base model, without edits. Read it, never change it."""
        return self._shared.base

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the base model. Two threads must not use it at once."""
        return self._shared.tokenizer

    @property
    def busy(self) -> int:
        """How many calls run or wait, of all engines that share the base model."""
        return self._shared.worker.busy

    def label(self, value: str) -> str:
        """What people call a value. A stranger's text: escape it."""
        return self.system[value].label

    def beyond(self, dials: Mapping[str, float]) -> list[str]:
        """The values that are dialled beyond their fluent range."""
        return [name for name, s in dials.items() if not self.ranges[name][0] <= s <= self.ranges[name][1]]

    def check(self, dials: Mapping[str, float]) -> Dials:
        """The dials that are not at 0, as numbers.

        Raises:
            `NeVAError`: For values that the map does not have, and strengths that are none or beyond the reach.
        """
        return checked_dials(dials, self.values, self.reach)

    def stream(
        self,
        history: Sequence[Exchange | Sequence[str]],
        question: str,
        dials: Mapping[str, float],
        *,
        seed: int = 0,
        max_new_tokens: int = 120,
        temperature: float = 0.0,
        gate: bool = False,
    ) -> Iterator[Turn]:
        """Both answers to a question, while they grow. Closing the iterator stops the model.

        Args:
            history (`Sequence[Exchange]`): The conversation so far; each side goes on with its own answers.
            question (`str`): What is asked.
            dials (`dict[str, float]`): The dials of the edited side.
            seed (`int`): For sampling; both sides draw the same numbers.
            max_new_tokens (`int`): The longest answer.
            temperature (`float`): 0 for the likeliest words.
            gate (`bool`): Whether gates are used, where the map has them.

        Returns:
            `Iterator[Turn]`: The last one is `done`.

        Raises:
            `NeVAError`: At once for what may not be asked; at a turn for what goes wrong later.
        """
        sampling = Sampling(seed, max_new_tokens, temperature)
        return as_turns(self.rows(sides(history), question, [{}, dials], sampling, gate=gate))

    def rows(
        self,
        histories: Sequence[History],
        question: str,
        strengths: Sequence[Mapping[str, float]],
        sampling: Sampling,
        *,
        gate: bool = False,
    ) -> Generator[Rows, None, None]:
        """Answers to one question at several settings of the dials, while they grow.

        Args:
            histories (`Sequence[History]`): The conversation of each row.
            question (`str`): What is asked.
            strengths (`Sequence[dict[str, float]]`): The dials of each row.
            sampling ([`Sampling`]): How answers are made; checked here.
            gate (`bool`): Whether gates are used, where the map has them.

        Returns:
            `Generator[Rows, None, None]`: The last one is `done`.

        Raises:
            `NeVAError`: As for [`Engine.stream`].
        """
        shared, limits = self._shared, self.limits
        if not 1 <= len(strengths) <= limits.rows or len(histories) != len(strengths):
            raise NeVAError(f"There may be 1 to {limits.rows} answers at once.")
        dials = [self.check(row) for row in strengths]
        sampling = checked_sampling(sampling.seed, sampling.max_new_tokens, sampling.temperature, limits)
        asked = checked_texts(question, histories, limits)
        context = getattr(text_config(shared.base), "max_position_embeddings", None) or limits.prompt_tokens * 2
        room = min(limits.prompt_tokens, context - sampling.max_new_tokens)
        with shared.reading:
            prompts = [prompt_ids(shared.tokenizer, asked, history, room) for history in histories]

        def work(tell: Callable[[Rows], None], gone: threading.Event) -> Rows:
            return generate_rows(
                self.model,
                shared.tokenizer,
                prompts,
                dials,
                sampling,
                gate=bool(gate),
                seconds=limits.seconds,
                tell=tell,
                gone=gone,
            )

        return read_rows(shared.worker, limits, work)
