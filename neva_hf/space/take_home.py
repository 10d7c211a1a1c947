"""The current dials to take along: as Python, on the command line, through the page's API, as a stock adapter, as JSON.

Invariant: what a visitor or a map says enters code only quoted for the language that it stands in.

The page's API that [`curl`] calls is the endpoint `/answer`; its inputs are `API_INPUTS`, in that order.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import torch

from neva_hf.map_files import natural_order
from neva_hf.strengths import scale_by_units
from neva_hf.talk import NEXT_QUESTION

from .engine import Engine
from .state import to_link

API_NAME = "answer"
API_INPUTS = ("question", "dials", "seed", "max_new_tokens", "temperature", "gate")

_NOWHERE = "http://127.0.0.1:7860"
# Where the map lies that came with neva-hf, for Python and for a shell: in a clone it is elsewhere than in an installation.
_SHIPPED = "from neva_hf.space.maps import default_map\n"
_MAP = "map=$(python -c 'from neva_hf.space.maps import default_map; print(default_map())')\n"

_NOTHING = "# All dials are at 0, which is the base model. Turn one first.\n"


def python(
    engine: Engine,
    dials: Mapping[str, float],
    question: str,
    seed: int,
    url: str = "",
    *,
    max_new_tokens: int = 120,
    temperature: float = 0.0,
    gate: bool = False,
) -> str:
    """A program that gives the edited answer. At temperature 0 it is the page's, word for word.

    Args:
        engine ([`Engine`]): The page's model.
        dials (`dict[str, float]`): The dials.
        question (`str`): What is asked.
        seed (`int`): For sampling.
        url (`str`): Where the page is, for the link in the first line.
        max_new_tokens (`int`): The longest answer.
        temperature (`float`): 0 for the likeliest words.
        gate (`bool`): Whether gates are used.

    Returns:
        `str`: Python.
    """
    turned = engine.check(dials)
    plain = not getattr(engine.tokenizer, "chat_template", None)
    sampled = temperature > 0
    options = {"max_new_tokens": repr(max_new_tokens), "do_sample": repr(sampled)}
    if sampled:
        options |= {"temperature": f"{temperature:g}", "top_p": "0.95"}
    if engine.has_gate:
        options["gate"] = repr(gate)
    if plain:
        options |= {"stop_strings": f"[{NEXT_QUESTION!r}]", "tokenizer": "tokenizer"}
    given = "".join(f"    {name}={text},\n" for name, text in options.items())
    found = "default_map()" if engine.shipped else repr(engine.source)
    if _other_base(engine):
        names = "NeVAModel, load_base"
        loading = (
            f"base, tokenizer = load_base({engine.base_name!r})\nmodel = NeVAModel.from_pretrained(base, {found})\n"
        )
    else:
        names = "NeVAModel"
        loading = f"model = NeVAModel.from_pretrained({found})\ntokenizer = model.tokenizer\n"
    where = f"# {_link(engine, turned, question, seed, url, temperature, gate)}\n" if url else ""
    seeding = f"torch.manual_seed({seed})  # the page draws its random numbers in another way\n" if sampled else ""
    return (
        f"# pip install neva-hf\n{where}"
        + ("import torch\n\n" if sampled else "")
        + f"from neva_hf import {names}\nfrom neva_hf.prompts import format_prompt\n"
        + (_SHIPPED if engine.shipped else "")
        + "\n"
        + loading
        + f"\nprompt = format_prompt(tokenizer, {question.strip()!r})\n"
        + 'inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)\n'
        + seeding
        + f"answer = model.generate(\n    **inputs,\n    strengths={turned!r},\n{given})\n"
        + 'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )


def command_line(
    engine: Engine,
    dials: Mapping[str, float],
    question: str,
    seed: int,
    url: str = "",
    *,
    max_new_tokens: int = 120,
    temperature: float = 0.0,
    gate: bool = False,
) -> str:
    """The same with the `neva` command. See [`python`].

    Returns:
        `str`: For a shell.
    """
    words = ["--base", engine.base_name] if _other_base(engine) else []
    for name, strength in engine.check(dials).items():
        words += ["--set", f"{name}={strength:g}"]
    words += ["--max-new-tokens", str(max_new_tokens)]
    words += ["--temperature", f"{temperature:g}", "--seed", str(seed)] if temperature > 0 else []
    command = f"neva chat {_shell_map(engine)} {shlex.join(words)}"
    # One line is one question there, and a slash begins a command.
    line = " ".join(question.split())
    asked = "" if not line or line.startswith("/") else f"printf '%s\\n' {shlex.quote(line)} | "
    return f'# pip install "neva-hf[cli]"\n{_MAP if engine.shipped else ""}{asked}{command}\n'


def curl(
    engine: Engine,
    dials: Mapping[str, float],
    question: str,
    seed: int,
    url: str = "",
    *,
    max_new_tokens: int = 120,
    temperature: float = 0.0,
    gate: bool = False,
) -> str:
    """The same through the page's API. See [`python`].

    Returns:
        `str`: For a shell: the first request puts the question, the second one reads the answers as they grow.
    """
    if engine.visiting:
        start = f"neva space {shlex.quote(engine.source)}"
        return f"# The API of this page serves the page's own map. Start a page with yours: {start}\n"
    inputs: dict[str, Any] = {
        "question": question.strip(),
        "dials": engine.check(dials),
        "seed": seed,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "gate": gate,
    }
    body = json.dumps({"data": [inputs[name] for name in API_INPUTS]})
    place = f"{url.rstrip('/') or _NOWHERE}/gradio_api/call/{API_NAME}"
    return (
        f"event=$(curl -s {shlex.quote(place)} -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)} \\\n"
        "  | cut -d '\"' -f 4)\n"
        f'curl -sN {shlex.quote(place)}/"$event"\n'
    )


def stock(
    engine: Engine,
    dials: Mapping[str, float],
    question: str,
    seed: int,
    url: str = "",
    **options: Any,
) -> str:
    """How the dials become an adapter that needs PEFT alone. See [`python`].

    Returns:
        `str`: For a shell, or a sentence (as a comment) that says why it cannot be.
    """
    turned = engine.check(dials)
    if not turned:
        return _NOTHING
    if engine.has_gate:
        return (
            "# This map has gates, which decide at every token: it needs neva-hf, and no other adapter can hold it.\n"
        )
    words = ["my-adapter"]
    words += ["--base", engine.base_name] if _other_base(engine) else []
    words += ["--strengths", ",".join(f"{name}={strength:g}" for name, strength in turned.items())]
    command = f"neva export stock {_shell_map(engine)} {shlex.join(words)}"
    return (
        f'pip install "neva-hf[cli]"\n{_MAP if engine.shipped else ""}{command}\n\n'
        + "# From then on, with PEFT alone:\npython <<'END'\n"
        + "from peft import AutoPeftModelForCausalLM\n\n"
        + 'model = AutoPeftModelForCausalLM.from_pretrained("my-adapter")\nEND\n'
    )


def edit_json(
    engine: Engine,
    dials: Mapping[str, float],
    question: str,
    seed: int,
    url: str = "",
    **options: Any,
) -> str:
    """The edit itself: at these dials, what is added to which neuron. See [`python`].

    Returns:
        `str`: JSON, one module per line.
    """
    turned = engine.check(dials)
    config = engine.map.config
    table = torch.tensor([[turned.get(name, 0.0) for name in config.values]], dtype=torch.float32)
    coefficients = scale_by_units(table, config.values, config.units)
    rule = "x[index] += shift" + (" + gain * x[index]" if config.use_gain else "")
    about: dict[str, Any] = {
        "map": engine.source,
        "base_model": engine.base_name,
        "strengths": turned,
        "rule": f"at every token, with x the input of the module: {rule}",
    }
    if config.use_gate and options.get("gate"):
        about["gates"] = "these are the most that is added: gates decide at every token how much of it is needed"
    if url:
        kept = {"temperature": options.get("temperature", 0.0), "gate": bool(options.get("gate"))}
        about["link"] = _link(engine, turned, question, seed, url, **kept)
    lines = []
    for name in sorted(engine.map.modules, key=natural_order):
        edits = engine.map.modules[name]
        numbers = {"shift": (coefficients @ edits.shift)[0]}
        if edits.gain is not None:
            numbers["gain"] = (coefficients @ edits.gain)[0]
        used = torch.stack(list(numbers.values())).ne(0).any(0)
        if not bool(used.any()):
            continue
        found: dict[str, list[Any]] = {"index": edits.index[used].tolist()}
        found |= {key: [float(f"{one:.7g}") for one in row[used].tolist()] for key, row in numbers.items()}
        lines.append(f"    {json.dumps(name)}: {json.dumps(found, separators=(',', ':'))}")
    head = json.dumps(about, indent=2, ensure_ascii=False).removesuffix("\n}")
    return head + ',\n  "modules": {\n' + ",\n".join(lines) + ("\n" if lines else "") + "  }\n}\n"


def _shell_map(engine: Engine) -> str:
    return '"$map"' if engine.shipped else shlex.quote(engine.source)


def _other_base(engine: Engine) -> bool:
    return engine.base_name != engine.map.base_model


def _link(
    engine: Engine,
    dials: Mapping[str, float],
    question: str,
    seed: int,
    url: str,
    temperature: float = 0.0,
    gate: bool = False,
) -> str:
    own = engine.source if engine.visiting else ""
    link = f"{url.rstrip('/')}/?{to_link(dials, question, seed, temperature=temperature, gate=gate, map=own)}"
    # (an address may come from a request's headers, so it may hold a new line)
    return "".join(link.split())
