"""Where the activation function of each feed-forward network is."""

from __future__ import annotations

from torch import nn

from neva_hf.architectures import decoder_blocks

# In the order in which they are looked for, inside a decoder block.
ACTIVATIONS = (
    "mlp.act_fn",  # Llama, Mistral, Qwen, Gemma, OLMo, Granite, SmolLM, Cohere, StableLM
    "mlp.activation_fn",  # Phi-3, Phi
    "mlp.act",  # GPT-2, GPT-NeoX, Falcon, Starcoder2
    "mlp.gelu_impl",  # BLOOM
    "ffn.act",  # MPT
    "activation_fn",  # OPT, BioGPT, XGLM
)


def find_activations(model: nn.Module) -> list[str] | None:
    """Finds the activation function of every decoder block.

    Args:
        model (`nn.Module`): A causal language model of transformers.

    Returns:
        `list[str]` or `None`: Full module names in the order of the blocks; `None` where one has no module of its own
        (a plain function, or one module that several blocks share, whose calls cannot be told apart).
    """
    name, blocks = decoder_blocks(model)
    found, modules = [], set()
    for number, block in enumerate(blocks):
        inside = dict(block.named_modules())
        ending = next((ending for ending in ACTIVATIONS if ending in inside), None)
        if ending is None or inside[ending] in modules:
            return None
        modules.add(inside[ending])
        found.append(f"{name}.{number}.{ending}")
    return found
