"""Run by test_export_external.py in an environment that has vLLM and no neva_hf.

python vllm_answers.py FOLDER TOKENS.json NEW_TOKENS ANSWER.json
"""

from __future__ import annotations

import json
import sys


def main(folder: str, tokens_file: str, count: str, answer_file: str) -> None:
    from vllm import LLM, SamplingParams

    with open(tokens_file) as file:
        tokens = json.load(file)
    model = LLM(model=folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=1, seed=0)
    options = SamplingParams(temperature=0.0, max_tokens=int(count), ignore_eos=True, logprobs=1)
    made = model.generate({"prompt_token_ids": tokens}, options)[0].outputs[0]
    logprobs = [row[token].logprob for row, token in zip(made.logprobs, made.token_ids, strict=True)]
    with open(answer_file, "w") as file:
        json.dump({"tokens": list(made.token_ids), "logprobs": logprobs}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
