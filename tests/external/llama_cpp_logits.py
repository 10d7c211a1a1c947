"""Run by test_export_external.py in an environment that has llama.cpp and no neva_hf.

python llama_cpp_logits.py MODEL.gguf CONTROL_VECTOR.gguf|none TOKENS.json LOGITS.npy
"""

from __future__ import annotations

import json
import sys

import numpy as np
from gguf import GGUFReader
from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib


def main(model_file: str, control_vector: str, tokens_file: str, logits_file: str) -> None:
    with open(tokens_file) as file:
        tokens = json.load(file)
    ffi, lib = get_ffi(), get_lib()
    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    model = lib.llama_model_load_from_file(model_file.encode(), options)
    assert model != ffi.NULL, "llama.cpp does not load the model"
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(256, len(tokens))
    settings.n_threads = settings.n_threads_batch = 1
    # Everything in float32 (0), for a comparison that rounding does not blur.
    settings.type_k = settings.type_v = 0
    settings.flash_attn_type = 0
    context = lib.llama_init_from_model(model, settings)
    assert context != ffi.NULL
    if control_vector != "none":
        # As llama.cpp's own loader lays it out: dense, from the second block on, zeros where there is no direction.
        directions = {int(t.name.split(".")[1]): t.data for t in GGUFReader(control_vector).tensors}
        hidden, blocks = lib.llama_model_n_embd(model), lib.llama_model_n_layer(model)
        dense = np.zeros((blocks - 1, hidden), dtype=np.float32)
        for number, direction in directions.items():
            dense[number - 1] = direction
        numbers = ffi.cast("float *", ffi.from_buffer(dense))
        assert lib.llama_set_adapter_cvec(context, numbers, dense.size, hidden, 1, blocks) == 0
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    assert lib.llama_decode(context, batch) == 0
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = [ffi.buffer(lib.llama_get_logits_ith(context, place), 4 * vocabulary) for place in range(len(tokens))]
    np.save(logits_file, np.stack([np.frombuffer(row, dtype=np.float32) for row in rows]))


if __name__ == "__main__":
    main(*sys.argv[1:])
