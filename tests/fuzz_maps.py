"""Breaks neuron maps in thousands of ways, and says what loading them came to.

Run by test_fuzz_maps.py in a process of its own, whose memory is limited. Everything follows from the seed.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny import random_map, tiny_model

from neva_hf import NeuronMap, NeVAError, NeVAModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What one map may take: far more than any that is loaded here needs, far less than a broken size would ask for.
ROOM = 400 * 2**20
SECONDS = 30

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], Files]

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, "", "x", "NEVA", "\u202e", "\ud800", "é" * 70,
    "a" * 100_000, "(a+)+$", "a{99999999999}", "(" * 500, [], [[]], [None], ["x"] * 300, {}, {"x": {}}, {"": 1},
    {"power": [1, 2]}, {"power": None}, [[[[[[[[]]]]]]]],
]  # fmt: skip


def read(folder: Path) -> Files:
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def split(weights: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", weights[:8])[0]
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: str | dict[str, Any], data: bytes) -> bytes:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw + data


def flipped(chance: random.Random, files: Files) -> Files:
    """Some bits, anywhere in one file, or in the first bytes, where lengths and names are."""
    name = chance.choice([CONFIG, WEIGHTS])
    content = bytearray(files[name])
    reach = chance.choice([16, 2000, len(content)])
    for _ in range(chance.choice([1, 1, 2, 8])):
        content[chance.randrange(min(reach, len(content)))] ^= 1 << chance.randrange(8)
    return {**files, name: bytes(content)}


def cut(chance: random.Random, files: Files) -> Files:
    """A file with an end, a middle or a beginning less, or something more."""
    name = chance.choice([CONFIG, WEIGHTS])
    content = files[name]
    one, two = sorted((chance.randrange(len(content) + 1), chance.randrange(len(content) + 1)))
    cuts = [content[:one], content[one:], content[:one] + content[two:], content[:two] + content[one:]]
    return {**files, name: chance.choice([*cuts, content + chance.randbytes(chance.randrange(1, 50)), b""])}


def new_header(chance: random.Random, files: Files) -> Files:
    """A safetensors header that tells something else of the same bytes."""
    header, data = split(files[WEIGHTS])
    names = [name for name in header if name != "__metadata__"]
    name = chance.choice(names)
    entry = header[name]
    sizes = [0, 1, -1, 7, 2**31, 2**62, 2**63, 2**64, 10**30, 1.0, "3", None, True]
    what = chance.randrange(12)
    if what == 0:
        entry["dtype"] = chance.choice(["F64", "F16", "BF16", "I64", "U8", "I32", "F32", "BOOL", "F4", "", 5, None])
    elif what == 1:
        entry["shape"] = chance.choice(
            [[], [0], [2**40, 2**40], [chance.choice(sizes)], entry["shape"][::-1], "x", {}]
        )
    elif what == 2:
        entry["data_offsets"][chance.randrange(2)] = chance.choice([*sizes, chance.randrange(len(data) + 9)])
    elif what == 3:
        entry["data_offsets"] = header[chance.choice(names)]["data_offsets"]
    elif what == 4:
        del entry[chance.choice(sorted(entry))]
    elif what == 5:
        entry[chance.choice(["more", "", "__class__"])] = chance.choice(JUNK)
    elif what == 6:
        endings = ["x", "lora_A.weight", "\ud800", "", "y" * 5000, "..", "neva_index"]
        new = chance.choice([name + chance.choice(endings), *endings, name.replace("neva_", "")])
        header[new] = header.pop(name)
    elif what == 7:
        del header[name]
    elif what == 8:
        header["__metadata__"] = chance.choice([*JUNK, {"format": "pt", "x": "y" * 9999}])
    elif what == 9:
        text = json.dumps(header)
        return {
            **files,
            WEIGHTS: joined(text.rstrip()[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}" + "}", data),
        }
    elif what == 10:
        length = chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(files[WEIGHTS])])
        return {**files, WEIGHTS: struct.pack("<Q", length) + files[WEIGHTS][8:]}
    else:
        text = chance.choice(["[" * 50_000, '{"a":' * 50_000, "{}", "[]", "null", '{"__metadata__": {}}', " " * 9999])
        return {**files, WEIGHTS: joined(text, data)}
    return {**files, WEIGHTS: joined(header, data)}


def new_numbers(chance: random.Random, files: Files) -> Files:
    """Numbers that are not finite, neurons that are not there."""
    header, data = split(files[WEIGHTS])
    content = bytearray(data)
    for _ in range(chance.choice([1, 1, 5])):
        place = chance.randrange(len(content) // 4) * 4
        number = chance.choice(
            [b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"]
        )
        content[place : place + 4] = number
    return {**files, WEIGHTS: joined(header, bytes(content))}


def new_config(chance: random.Random, files: Files) -> Files:
    """Another value, name or order somewhere in the config."""
    config = json.loads(files[CONFIG])
    place: Any = config
    for _ in range(chance.choice([0, 0, 1, 2, 5])):
        below = [
            item for item in (place.values() if isinstance(place, dict) else place) if isinstance(item, dict | list)
        ]
        below = [item for item in below if item]
        if not below:
            break
        place = chance.choice(below)
    key = chance.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
    what = chance.randrange(6)
    if what <= 2:
        place[key] = copy.deepcopy(chance.choice(JUNK))
    elif what == 3:
        del place[key]
    elif what == 4 and isinstance(place, dict):
        place[chance.choice(["", "x", "\ud800", key + "x", "__proto__", "auto_map", "custom_code"])] = place[key]
    else:
        text = json.dumps(config)
        found = chance.choice([": ", ", ", "]", "}"])
        inserted = chance.choice(
            ["NaN, ", "Infinity", "1e999", '"a": 1, "a": 2, ', "[" * 2000, "-" * 50, "9" * 5000, "\0"]
        )
        return {**files, CONFIG: text.replace(found, found + inserted, 1).encode()}
    return {**files, CONFIG: json.dumps(config).encode()}


MUTATIONS: tuple[Mutation, ...] = (flipped, cut, new_header, new_numbers, new_config)


def broken(chance: random.Random, files: Files) -> Files:
    for _ in range(chance.choice([1, 1, 1, 2])):
        # (what is too broken already to be broken in another way stays as it is)
        with contextlib.suppress(ValueError, LookupError, struct.error, AttributeError, TypeError, RecursionError):
            files = chance.choice(MUTATIONS)(chance, files)
    return files


def assert_sound(neuron_map: NeuronMap) -> None:
    for edits in neuron_map.modules.values():
        assert edits.index.unique().numel() == edits.index.numel()
        assert int(edits.index.min()) >= 0
        for name, tensor in edits.tensors().items():
            assert torch.isfinite(tensor).all()
            assert name == "index" or tensor.shape[0] == len(neuron_map.values)


def bounded_memory() -> None:
    """From here on, whoever asks for much more memory than there is in use gets none."""
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize"))
    limit = int(used.split()[1]) * 1024 + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(published: str, count: int, through_peft: int, seed: int = 0) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    bases = {kind: tiny_model() for kind in ("map", "peft")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "map")
        small = random_map(bases["map"], gain=True, gate=True, provenance={"method": "random", "layers": [0, 1]})
        originals = [read(small.save_pretrained(folder)), *([read(Path(published))] if published else [])]
        for files in originals:
            for name, content in files.items():
                (folder / name).write_bytes(content)
            assert_sound(NeuronMap.from_pretrained(folder))
        PeftModel.from_pretrained(bases["peft"], str(small.save_pretrained(folder))).unload()
        bounded_memory()
        told: Counter[str] = Counter()
        chance = random.Random(seed)
        for number in range(count + through_peft):
            peft = number >= count
            # (PEFT parses the config itself before it asks us, so there only the weights are broken)
            original = originals[0] if peft else originals[number % len(originals)]
            files = broken(chance, original)
            if peft:
                files = {**files, CONFIG: original[CONFIG]}
            for name, content in files.items():
                (folder / name).write_bytes(content)
            signal.alarm(SECONDS)
            try:
                if peft:
                    loaded = PeftModel.from_pretrained(copy.deepcopy(bases["peft"]), str(folder))
                    assert_sound(NeuronMap.from_model(loaded))
                else:
                    neuron_map = NeuronMap.from_pretrained(folder)
                    assert_sound(neuron_map)
                    if original is originals[0] and told["used"] < 60:
                        told["used"] += 1
                        NeVAModel.from_map(copy.deepcopy(bases["map"]), neuron_map).set_strengths({})
                told["loaded"] += 1
            except NeVAError as error:
                told["refused"] += 1
                assert len(str(error)) < 3000, f"a message of {len(str(error))} characters: {str(error)[:300]}"
            except Exception:
                sys.stderr.write(f"number {number}, files kept in {keep(files)}\n{traceback.format_exc()}")
                raise SystemExit(1) from None
            finally:
                signal.alarm(0)
        sys.stdout.write(json.dumps(told))


def keep(files: Files) -> Path:
    kept = Path(tempfile.mkdtemp(prefix="broken-map-"))
    for name, content in files.items():
        (kept / name).write_bytes(content)
    return kept


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:]))
