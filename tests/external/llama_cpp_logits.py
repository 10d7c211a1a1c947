"""Run by test_export_external.py in an environment that has llama-cpp-python and no neva_hf.

python llama_cpp_logits.py MODEL.gguf CONTROL_VECTOR.gguf|none LORA.gguf|none TOKENS.json LOGITS.npy
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np
from gguf import GGUFReader


def main(model_file: str, control_vector: str, lora: str, tokens_file: str, logits_file: str) -> None:
    with open(tokens_file) as file:
        tokens = json.load(file)
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(model_file.encode(), options)
    assert model, "llama.cpp does not load the model"
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(256, len(tokens))
    settings.n_threads = settings.n_threads_batch = 1
    # Everything in float32 (0), for a comparison that rounding does not blur.
    settings.type_k = settings.type_v = 0
    settings.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context
    if control_vector != "none":
        # As llama.cpp's own loader lays it out: dense, from the second block on, zeros where there is no direction.
        directions = {int(t.name.split(".")[1]): t.data for t in GGUFReader(control_vector).tensors}
        hidden, blocks = llama_cpp.llama_model_n_embd(model), llama_cpp.llama_model_n_layer(model)
        dense = np.zeros((blocks - 1, hidden), dtype=np.float32)
        for number, direction in directions.items():
            dense[number - 1] = direction
        numbers = dense.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        assert llama_cpp.llama_set_adapter_cvec(context, numbers, dense.size, hidden, 1, blocks) == 0
    if lora != "none":
        adapter = llama_cpp.llama_adapter_lora_init(model, lora.encode())
        assert adapter, "llama.cpp does not load the LoRA adapter"
        adapters, scales = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
        assert llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales) == 0
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, n), (vocabulary,)) for n in range(len(tokens))
    ]
    np.save(logits_file, np.stack(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
