"""The parts of a card that say what a map is: from the map alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .card_text import escape, is_repo_id, table
from .errors import NeVAError
from .export.gguf import ARCHITECTURES
from .map_files import natural_order
from .neuron_map import NeuronMap
from .values import ValueSystem

_BAR = 24
_MOST_NOTES = 60
# What a search notes down, in words that a reader knows.
_NOTES = {
    "layers": "layers searched",
    "neurons": "neurons per value",
    "neutral texts": "neutral texts for the cost",
    "samples": "samples of the cost (Fisher)",
    "scenarios": "scenarios fitted on",
    "target kl": "KL divergence at strength 1 (nats per token)",
}
# Words in a base model's name that say that it was trained to chat.
_CHATS = ("instruct", "chat", "-it")


def number(found: Any, *path: str) -> float | None:
    """A number somewhere in a stranger's data, or `None` if there is none."""
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
    return float(found) if is_number and abs(found) < 1e9 else None


def value_system(neuron_map: NeuronMap) -> ValueSystem | None:
    """The definitions that a map brings, where they are sound."""
    try:
        given = neuron_map.config.value_system
        return None if given is None else ValueSystem.from_dict(given)
    except NeVAError:
        return None


def base_link(neuron_map: NeuronMap) -> str:
    """The base model, with a link where its name is a repository's."""
    name = neuron_map.base_model
    if name is None:
        return "a base model that the map does not name"
    return f"[{escape(name)}](https://huggingface.co/{name})" if is_repo_id(name) else escape(name)


def title(neuron_map: NeuronMap, headline: str = "") -> str:
    """The heading, and in a few sentences what this is.

    Args:
        neuron_map ([`NeuronMap`]): The map.
        headline (`str`): What was measured, in a sentence.

    Returns:
        `str`: Markdown.
    """
    system = value_system(neuron_map)
    base = escape((neuron_map.base_model or "an unnamed model").split("/")[-1])
    count = len(neuron_map.values)
    about = f"{escape(system.label, 80)}" if system is not None else f"{count} value{'s' if count > 1 else ''}"
    edited = sum(edits.index.numel() for edits in neuron_map.modules.values())
    layers, every = len(neuron_map.modules), (neuron_map.config.base or {}).get("num_hidden_layers")
    among = f"{layers} of {every}" if isinstance(every, int) and every >= layers else f"{layers}"
    return (
        f"# {about}: a neuron map of {base}\n\n"
        f"A **neuron map** for {base_link(neuron_map)}. It edits {edited:,} feed-forward neurons in {among} layers while "
        f"the model runs, so that answers lean towards, or away from, {'each of ' if count > 1 else ''}{count} "
        f"value{'s' if count > 1 else ''}: as much as you say, for every request. Nothing was trained and no weight "
        "changes; at strength 0 the model is the base model, bit for bit. It is a "
        f"PEFT adapter of safetensors and JSON, and holds no code.{' ' + headline if headline else ''}"
    )


def use(neuron_map: NeuronMap, source: str | None, subfolder: str | None = None) -> str:
    """How to load it: with neva-hf, with PEFT, and without neva-hf.

    Args:
        neuron_map ([`NeuronMap`]): The map.
        source (`str`, *optional*): The repository that the card is for.
        subfolder (`str`, *optional*): Where in it the map is.

    Returns:
        `str`: Markdown.
    """
    where = f'"{source or "USER/MAP"}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    first = neuron_map.values[0]
    low, high = neuron_map.config.ranges.get(first, [-1.0, 1.0])
    strength = f"{min(1.5, high):g}" if high > 0 else f"{max(-1.0, low):g}"
    other = f", {neuron_map.values[1]}=-0.5" if len(neuron_map.values) > 1 else ""
    name = neuron_map.base_model if is_repo_id(neuron_map.base_model) else "BASE-MODEL"
    ask = (
        "model.tokenizer.apply_chat_template(\n"
        '    [{"role": "user", "content": "What should I do with a free weekend?"}],\n'
        '    add_generation_prompt=True,\n    return_tensors="pt",\n    return_dict=True,\n)'
        if any(word in str(name).lower() for word in _CHATS)
        else 'model.tokenizer("On a free weekend, the best thing to do is", return_tensors="pt")'
    )
    return f"""\
With [neva-hf](https://pypi.org/project/neva-hf/) (`pip install neva-hf`), which fetches the base model as well:

```python
from neva_hf import NeVAModel

model = NeVAModel.from_pretrained({where})
inputs = {ask}
answer = model.generate(**inputs, strengths={{"{first}": {strength}}}, max_new_tokens=60)
print(model.tokenizer.decode(answer[0], skip_special_tokens=True))

model.set_strengths({first}={strength}{other})  # until set again
```

`strengths` in `generate` may also be a list, one dict for each row of the batch.

As a PEFT adapter. `import neva_hf` must come first, else PEFT answers `KeyError: 'NEVA'`:

```python
import neva_hf
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}")
model = PeftModel.from_pretrained(base, {where})
model.generate(**inputs, strengths={{"{first}": {strength}}})
```

{_without(neuron_map, source, name, first, strength)}"""


def _without(neuron_map: NeuronMap, source: str | None, name: object, value: str, strength: str) -> str:
    if neuron_map.config.use_gate:
        return "This map has gates: what it adds depends on each token, so it needs neva-hf, and nothing else can hold it."
    is_exact = (neuron_map.config.base or {}).get("model_type") in ARCHITECTURES
    vector = (
        "`neva export gguf` writes a control vector for llama.cpp"
        + (", and a LoRA adapter beside it that holds the gains." if neuron_map.config.use_gain else ".")
        if is_exact
        else "A control vector for llama.cpp is not known to be exact on this architecture."
    )
    return f"""\
Without neva-hf, at strengths that are fixed once (`pip install "neva-hf[cli]"` where that is done):

```bash
neva export stock {source or "USER/MAP"} my-adapter --strengths {value}={strength}
```

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{name}")
model = PeftModel.from_pretrained(base, "my-adapter")  # PEFT alone, nothing of neva-hf
```

`neva export merge` writes it into a whole model, where its architecture can hold it (Llama can, Gemma and Qwen cannot).
{vector}"""


def values(neuron_map: NeuronMap) -> str:
    """The values: what they are, how far they can be turned, what strength 1 costs, how many neurons they edit."""
    config, system, counts = neuron_map.config, value_system(neuron_map), neuron_map.neuron_counts()
    rows = []
    for value in neuron_map.values:
        low, high = config.ranges.get(value, [None, None])
        kls = [number(config.measurements, "calibration", value, side, "kl") for side in ("-1", "+1")]
        meaning = escape(system[value].definition) if system is not None and value in system else ""
        rows.append(
            [
                f"`{value}`",
                meaning,
                *("?" if end is None else f"{end:+g}" for end in (low, high)),
                *("?" if kl is None else f"{kl:.3f}" for kl in kls),
                f"{sum(counts[value].values()):,}",
            ]
        )
    start = {value: strength for value, strength in config.default_strengths.items() if strength}
    return "\n\n".join(
        [
            "*Strength* 1 is the calibrated unit: the same KL divergence from the base model on neutral text for every "
            "value and sign. The text stays fluent from *lowest* to *highest*; beyond, neva-hf warns.",
            table(["value", "what it is", "lowest", "highest", "KL at −1", "KL at +1", "neurons"], rows, 2),
            *(
                [
                    "**Loading this map turns dials:** "
                    + ", ".join(f"`{value}` {strength:+g}" for value, strength in start.items())
                    + ". `set_strengths({})` puts them back to 0."
                ]
                if start
                else [
                    "KL: nats per token, on the texts that the strengths were calibrated on. Loading the map turns "
                    "nothing; all dials start at 0."
                ]
            ),
        ]
    )


def neurons(neuron_map: NeuronMap) -> str:
    """How many neurons each module edits, all values together."""
    sizes = {name: edits.index.numel() for name, edits in neuron_map.modules.items()}
    most = max(sizes.values())
    rows = [
        [escape(name, 120), f"{sizes[name]:,}", "█" * max(1, round(_BAR * sizes[name] / most))]
        for name in sorted(sizes, key=natural_order)
    ]
    heads = table(["down projection", "edited inputs", ""], rows).split("\n")
    heads[1] = "| --- | ---: | --- |"
    gains = " An edit is a shift and a gain: a multiple of the neuron's own activation that is added to it."
    return (
        "All values together; a neuron that several values edit counts once."
        f"{gains if neuron_map.config.use_gain else ''}\n\n" + "\n".join(heads)
    )


def provenance(neuron_map: NeuronMap, license: str | None = None) -> str:
    """Where the map comes from, in its own words, and the terms that it is given under."""
    config = neuron_map.config
    # The samples of weights that a map knows its base by say nothing to a reader.
    base = {
        key: fact
        for key, fact in (config.base or {}).items()
        if not isinstance(fact, Mapping) and (key, fact) != ("name", neuron_map.base_model)
    }
    notes = [(_NOTES.get(key, key), item) for key, item in _flat(config.provenance)]
    told = [("base model", neuron_map.base_model or "unnamed"), *_flat(base), *notes]
    rows = [[escape(key, 60), escape(item)] for key, item in told]
    lines = [table(["what", "as the map says"], rows[:_MOST_NOTES], 2)]
    if len(rows) > _MOST_NOTES:
        lines.append(f"{len(rows) - _MOST_NOTES} more in `adapter_config.json`.")
    terms = "Its owner has named no license for this map." if license is None else f"License of this map: `{license}`."
    lines.append(f"{terms} It is of no use without its base model, whose own terms hold as well.")
    if str(neuron_map.base_model).startswith("google/gemma"):
        lines.append(
            "Gemma is provided under and subject to the [Gemma Terms of Use](https://ai.google.dev/gemma/terms)."
        )
    return "\n\n".join(lines)


def _flat(found: Mapping[Any, Any], above: str = "", depth: int = 3) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, item in sorted(found.items(), key=lambda pair: str(pair[0])):
        name = f"{above}{str(key)[:40].replace('_', ' ')}"
        if isinstance(item, Mapping) and depth > 0:
            rows += _flat(item, f"{name}: ", depth - 1)
        elif item is not None:
            rows.append((name, ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)))
    return rows
