"""The header of a safetensors file, read and checked before any of its tensors.

The file is: 8 bytes, the header's length, little-endian; the header, a JSON object `name -> {dtype, shape,
data_offsets}`; the tensors' bytes, one after the other without gaps. The `safetensors` package reads the tensors; what
is checked here comes before, because it keeps the last of several equal names, and because a wrong header shall be named
rather than met halfway.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import NeVAError
from .strict_json import parse_json_object

MAX_HEADER_BYTES = 8 * 2**20
MAX_DIMS = 8
# Bytes per number, of all that the format knows and that a PyTorch tensor may have.
_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Args:
        dtype (`str`): In the words of the format, such as `F32`.
        shape (`tuple[int, ...]`): Its sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def read_header(path: str | os.PathLike[str], max_bytes: int) -> dict[str, TensorInfo]:
    """Reads and checks the header of a safetensors file. No tensor is read.

    Args:
        path (`str` or `os.PathLike`): The file.
        max_bytes (`int`): How large the file may be.

    Returns:
        `dict[str, TensorInfo]`: Name -> what is said of the tensor, in the order of their bytes.

    Raises:
        `NeVAError`: If the file is too large, or its header does not describe exactly the bytes that follow.

    Example:

    ```py
    >>> from neva_hf.tensor_header import read_header
    >>> read_header("map/adapter_model.safetensors", 2**30)  # doctest: +SKIP
    {'base_model.model.model.layers.6.mlp.down_proj.neva_index': TensorInfo(dtype='I32', shape=(92,)), ...}
    ```
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise NeVAError(f"{path.name} is larger than {max_bytes >> 30} GiB; that is no neuron map.")
            start = file.read(8)
            if len(start) < 8:
                raise _unsound(path, f"it has {size} bytes, and its header's length alone takes 8")
            length = struct.unpack("<Q", start)[0]
            if length > MAX_HEADER_BYTES:
                raise _unsound(path, f"its header would be {length} bytes long, and may be {MAX_HEADER_BYTES}")
            if 8 + length > size:
                raise _unsound(path, f"its header would be {length} bytes long, but the file has only {size}")
            raw = file.read(length)
    except OSError as error:
        raise NeVAError(
            f"{path.name} cannot be read ({error.strerror}): check the path and its permissions."
        ) from error
    entries = parse_json_object(raw, f"the header of {path.name}")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _unsound(path, "its __metadata__ must map texts to texts")
    found = sorted(
        ((_offsets(path, name, entry), name, _info(path, name, entry)) for name, entry in entries.items()),
        key=lambda item: item[0],
    )
    end = 0
    for (begins, ends), name, info in found:
        if begins != end or ends - begins != info.numel * _SIZES[info.dtype]:
            raise _unsound(
                path,
                f"{name:.120} of {info.dtype} {list(info.shape)} is said to be at bytes {begins} to {ends}, and the "
                f"tensor before it ends at {end}",
            )
        end = ends
    if 8 + length + end != size:
        raise _unsound(path, f"its tensors take {end} bytes, but {size - 8 - length} follow the header")
    return {name: info for _, name, info in found}


def _unsound(path: Path, why: str) -> NeVAError:
    return NeVAError(f"{path.name} is not a sound safetensors file ({why}); the neuron map is damaged.")


def _info(path: Path, name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _unsound(path, f"{name:.120} must have a dtype, a shape and data_offsets, and nothing else")
    dtype, shape = entry["dtype"], entry["shape"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _unsound(path, f"{name:.120} has the dtype {dtype!r:.40}, which PyTorch has no tensors of")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(number) for number in shape):
        raise _unsound(path, f"{name:.120} has the shape {shape!r:.80}")
    return TensorInfo(dtype, tuple(shape))


def _offsets(path: Path, name: str, entry: Any) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(number) for number in offsets):
        raise _unsound(path, f"{name:.120} has the data_offsets {offsets!r:.80}")
    return offsets[0], offsets[1]


def _is_size(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 2**48
