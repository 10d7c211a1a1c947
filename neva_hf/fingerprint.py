"""What a map remembers of the weights that it was made on, and how far other weights are from them.

A hash would call a copy of the same model in another precision a stranger. So a few hundred of the weights themselves are
kept, rounded to bfloat16: some of the embeddings and of every matrix of the first, the middle and the last decoder block.
Between two such samples stands the distance

    d = sqrt(mean over matrices of |a - b|^2 / |a|^2)

Measured on two small models: rounding to bfloat16 gives 0, to float16 0.001, GGUF's Q8_0 0.006, Q5_0 0.03 to 0.05, Q4_0
0.09 to 0.11, random weights of the same sizes 1.4 to 1.5. A fine-tune may lie anywhere from nearly 0 on, so a small
distance cannot tell one from a quantized copy: the names of the models decide what is said (see [`weights_message`]).

Where a base model is quantized, offloaded or sharded, its weights cannot be read cheaply; it has no fingerprint then, or
one of fewer matrices, and only what both sides know is compared.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from .errors import NeVAError
from .projection import innermost

VERSION = 1
SAMPLES = 32
MAX_MATRICES = 128
# Rows of embeddings beyond these may have been added or dropped by whoever changed the vocabulary.
_ROWS = 1024

# Distances up to which weights count as the same, and as those of another precision (see above).
SAME, SLIGHT, RELATED = 0.003, 0.15, 1.0

Verdict: TypeAlias = Literal["same", "slightly different", "different", "unrelated", "unknown"]


def fingerprint(embeddings: nn.Module | None, blocks: nn.ModuleList) -> dict[str, Any] | None:
    """Samples the weights of a model.

    Args:
        embeddings (`nn.Module`, *optional*): Its input embeddings.
        blocks (`nn.ModuleList`): Its decoder blocks.

    Returns:
        `dict[str, Any]`: `version` and `weights`, which maps the name of each matrix to 32 bfloat16 numbers of it
            (little-endian, base64). `None` where no weight can be read.

    Example:

    ```py
    >>> from neva_hf.architectures import describe_base
    >>> describe_base(model)["fingerprint"]["weights"]["embeddings"]  # doctest: +SKIP
    'FjwJvZy9...'
    ```
    """
    chosen = {"embeddings": _readable(embeddings)} if embeddings is not None else {}
    for number in sorted({0, len(blocks) // 2, len(blocks) - 1}):
        for name, module in _linear_parts(blocks[number]):
            if len(chosen) < MAX_MATRICES:
                chosen[f"{number}.{name}"] = _readable(module)
    weights = {name: _encoded(_sample(weight)) for name, weight in chosen.items() if weight is not None}
    return {"version": VERSION, "weights": weights} if weights else None


def check_fingerprint(found: Any) -> None:
    """Refuses a fingerprint that a stranger's file has and that cannot be read. Those of later versions are let pass.

    Raises:
        `NeVAError`: If it is damaged.
    """
    if found is None:
        return
    if not isinstance(found, Mapping) or not isinstance(found.get("version"), int):
        raise NeVAError(f"`base['fingerprint']` must be a dictionary with a version, got {found!r:.80}.")
    if found["version"] == VERSION:
        _decoded(found)


def distance(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> float | None:
    """How far the weights of two fingerprints are apart.

    Args:
        ours (`Mapping[str, Any]`, *optional*): What the map remembers.
        theirs (`Mapping[str, Any]`, *optional*): What is here.

    Returns:
        `float`: 0 for the same, about 1.4 for weights that have nothing in common. `None` where one of them is not
            known, or they share no matrix.

    Raises:
        `NeVAError`: If one cannot be read.
    """
    if ours is None or theirs is None or ours.get("version") != VERSION or theirs.get("version") != VERSION:
        return None
    first, second = _decoded(ours), _decoded(theirs)
    squares = []
    for name in first.keys() & second.keys():
        size = max(float(first[name].square().sum()), 1e-30)
        squares.append(min(float((first[name] - second[name]).square().sum()) / size, 1e6))
    return math.sqrt(sum(squares) / len(squares)) if squares else None


def verdict(ours: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None) -> Verdict:
    """What the distance between two fingerprints means.

    Returns:
        `str`: `"same"`, `"slightly different"` (another precision, or a light fine-tune), `"different"` (a fine-tune),
            `"unrelated"`, or `"unknown"`.
    """
    apart = distance(ours, theirs)
    if apart is None:
        return "unknown"
    if apart <= SAME:
        return "same"
    if apart <= SLIGHT:
        return "slightly different"
    return "different" if apart <= RELATED else "unrelated"


def weights_message(base: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """What to warn of when a map is put on a model of the right architecture.

    Args:
        base (`Mapping[str, Any]`): What the map remembers of its base model ([`describe_base`]).
        here (`Mapping[str, Any]`): The model that it is put on.

    Returns:
        `str`: A warning, or `None`: for the same weights, for slightly different ones under the same name (as a quantized
            copy has them), and where nothing is known.
    """
    found = verdict(base.get("fingerprint"), here.get("fingerprint"))
    names = _shown(base), _shown(here)
    same_name = base.get("name") is not None and base.get("name") == here.get("name")
    if found in ("same", "unknown") or (found == "slightly different" and same_name):
        return None
    apart = 100 * (distance(base.get("fingerprint"), here.get("fingerprint")) or 0)
    start = f"This neuron map was made on {names[0]}, and the weights of {names[1]} are {found} (by {apart:.1f}%)"
    if found == "slightly different":
        return f"{start}, as those of another precision or of a light fine-tune. Values should act about as measured."
    if found == "different":
        return (
            f"{start}, as those of a fine-tune. Its strengths were calibrated on other weights: look at what it does, or "
            "make a map for this model with `neva identify`."
        )
    return (
        f"{start}: they were not trained from one another. The edits will mean nothing here: load the base model that the "
        "map names, or make a map for this one with `neva identify`."
    )


def _shown(base: Mapping[str, Any]) -> str:
    name, revision = base.get("name"), base.get("revision")
    if not isinstance(name, str) or not name:
        return "a model without a name"
    return f"{name!r:.120}" + (f" ({revision:.12})" if isinstance(revision, str) else "")


def _linear_parts(block: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block that have a matrix, without those of adapters, by their names in the bare model."""
    block = innermost(block)
    weight = getattr(block, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        yield name, block
    for child_name, child in block.named_children():
        yield from _linear_parts(child, f"{name}.{child_name}" if name else child_name)


def _readable(module: nn.Module) -> torch.Tensor | None:
    """The weight of a module, where it is a plain matrix of floating-point numbers that are here."""
    weight = getattr(innermost(module), "weight", None)
    if not isinstance(weight, torch.Tensor) or type(weight.data) is not torch.Tensor or weight.dim() != 2:
        return None
    plain = weight.is_floating_point() and weight.dtype.itemsize >= 2 and not weight.is_meta
    return weight.detach() if plain and weight.numel() else None


def _sample(weight: torch.Tensor) -> torch.Tensor:
    """32 numbers of a matrix, spread over its rows and columns: bfloat16 on the CPU."""
    rows = min(weight.shape[0], _ROWS)
    steps = torch.arange(SAMPLES, device=weight.device)
    # (odd strides meet every row and column, whatever blocks the matrix was quantized in)
    return weight[(steps * 37 + 11) % rows, (steps * 101 + 7) % weight.shape[1]].to("cpu", torch.bfloat16)


def _encoded(sample: torch.Tensor) -> str:
    return base64.b64encode(sample.view(torch.uint8).numpy().tobytes()).decode("ascii")


def _decoded(found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    weights = found.get("weights")
    if not isinstance(weights, Mapping) or not 1 <= len(weights) <= MAX_MATRICES:
        raise NeVAError(f"`base['fingerprint']` must hold 1 to {MAX_MATRICES} matrices as `weights`; it is damaged.")
    decoded = {}
    for name, text in weights.items():
        try:
            raw = base64.b64decode(text, validate=True) if isinstance(text, str) and len(text) < 256 else b""
        except (binascii.Error, ValueError):
            raw = b""
        numbers = torch.frombuffer(bytearray(raw or b"\0\0"), dtype=torch.bfloat16) if len(raw) % 2 == 0 else None
        if len(raw) != 2 * SAMPLES or numbers is None or not bool(torch.isfinite(numbers).all()):
            raise NeVAError(
                f"`base['fingerprint']` must hold {SAMPLES} finite numbers of {name!r:.80}; it is damaged."
            )
        decoded[str(name)] = numbers.float()
    return decoded
