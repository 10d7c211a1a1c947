"""Where base models come from, what is said when something is wrong, and prompts."""

from __future__ import annotations

import http.server
import json
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tiny import tiny_tokenizer
from tiny_bases import build_tiny, no_wheels, same_weights, save_tiny, tiny_config, tiny_llama, without, write_gguf
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
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

GEMMA = "google/gemma-3-270m"


@pytest.fixture
def tiny_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose build is quick, on a machine that has nothing from the Hub."""
    monkeypatch.setenv("NEVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_build", build_tiny)
    monkeypatch.setattr(embedded, "fetch_wheels", no_wheels)
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


# Which source a model comes from of which there is an embedded copy


@pytest.mark.parametrize("name", [None, GEMMA])
def test_the_embedded_copy_is_used_when_the_hub_is_offline(
    name: str | None, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, tokenizer = load_base(name)
    assert model.name_or_path == (name or DEFAULT_BASE)
    assert same_weights(model, tiny_llama())
    assert tokenizer.pad_token == "<|end|>"


@pytest.mark.parametrize("name", [None, DEFAULT_BASE, GEMMA])
def test_the_embedded_copy_is_used_when_the_hub_is_down(
    name: str | None, tiny_cache: Path, point_hub_at: Any, closed_port: str, caplog: pytest.LogCaptureFixture
) -> None:
    point_hub_at(closed_port)
    with caplog.at_level(logging.INFO, logger="neva_hf"):
        model, _ = load_base(name)
    assert same_weights(model, tiny_llama())
    assert "The Hub does not answer" in caplog.text
    assert f"Loading the embedded copy of {name or DEFAULT_BASE} from {tiny_cache}" in caplog.text


def test_whoever_gets_the_embedded_gemma_is_told_its_terms_of_use(
    tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "_hub_answers", lambda question: False)
    with caplog.at_level(logging.INFO, logger="neva_hf"):
        load_base(DEFAULT_BASE)
        assert "terms" not in caplog.text
        load_base(GEMMA)
    assert "subject to the Gemma Terms of Use, https://ai.google.dev/gemma/terms" in caplog.text


def test_a_hub_that_answers_but_gates_the_model_ends_in_the_embedded_copy(
    tiny_cache: Path, hub: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="neva_hf"):
        model, _ = load_base(GEMMA)
    assert same_weights(model, tiny_llama())
    assert "The Hub does not answer" not in caplog.text
    assert "Using the embedded copy instead." in caplog.text
    assert f"it is gated. Accept its conditions at https://huggingface.co/{GEMMA}" in caplog.text


def fill_hub_cache(hub: Path, name: str, model: PreTrainedModel) -> None:
    """The layout of huggingface_hub's cache after a download."""
    repo = hub / ("models--" + name.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    save_tiny(repo / "snapshots" / ("0" * 40), model)


@pytest.mark.parametrize("name", [DEFAULT_BASE, GEMMA])
def test_a_copy_in_the_hubs_cache_comes_first_and_needs_no_network(
    name: str, tmp_path: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch, point_hub_at: Any, closed_port: str
) -> None:
    point_hub_at(closed_port)
    fill_hub_cache(tmp_path / "hub", name, tiny_llama(num_hidden_layers=1).to(torch.bfloat16))
    monkeypatch.setattr(base, "_hub_answers", None)
    monkeypatch.setattr(base, "embedded_folder", None)
    model, _ = load_base(name)
    assert model.config.num_hidden_layers == 1
    # The same type to compute in, whichever source it came from.
    assert model.dtype == torch.float32


def test_a_hub_that_fails_halfway_ends_in_the_embedded_copy(
    tiny_cache: Path, hub: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(base, "_hub_answers", lambda question: True)
    model, _ = load_base()
    assert same_weights(model, tiny_llama())
    assert "Using the embedded copy instead" in caplog.text


def test_a_revision_comes_from_the_hub_only(tiny_cache: Path, hub: str) -> None:
    with pytest.raises(NeVAError, match="the Hub has no such model"):
        load_base(revision="v1")
    with pytest.raises(NeVAError, match="it is gated"):
        load_base(GEMMA, revision="v1")


@pytest.mark.parametrize("where", [{"gguf_file": "q8.gguf"}, {"subfolder": "fine"}])
def test_a_file_or_a_folder_in_the_repository_comes_from_the_hub_only(
    where: dict[str, str], tiny_cache: Path, hub: str
) -> None:
    with pytest.raises(NeVAError, match="it is gated"):
        load_base(GEMMA, **where)


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
        # Everyone may read about a gated model, but not its files.
        if self.path.startswith("/api/models/google/"):
            answer = json.dumps({"id": self.path.removeprefix("/api/models/"), "gated": "manual"}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return
        codes = {
            "/owner/gated/": (403, "GatedRepo"),
            "/google/": (401, "GatedRepo"),
            "/owner/empty/": (404, "EntryNotFound"),
        }
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
