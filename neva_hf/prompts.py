"""A question and a reply as the text that a model reads, with or without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def format_prompt(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    *,
    system: str | None = None,
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """The text in front of a reply, up to the place where the reply begins.

    With a chat template it is the template's text, with the opening of the assistant's turn; thinking is switched off
    where the template can, because a reply follows. What a template adds by itself stays (SmolLM2's adds a system
    message of its own when none is given). A template that knows no system message gets it in the first question.

    Without one (base models) it is plain text:

    ```
    <system>

    Question: <question>
    Answer:
    ```

    The text is complete, including a beginning-of-text token where the model expects one: tokenize it with
    `add_special_tokens=False`, or the token would come twice. A reply is appended with [`format_reply`].

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of the model.
        question (`str`):
            What the user says.
        system (`str`, *optional*):
            Instructions that come before everything else.
        history (`Sequence[tuple[str, str]]`, *optional*):
            Earlier turns, as pairs of a question and its reply.

    Returns:
        `str`: the prompt.

    Example:

    ```py
    >>> from neva_hf.base import load_base
    >>> from neva_hf.prompts import format_prompt
    >>> model, tokenizer = load_base()
    >>> format_prompt(tokenizer, "What now?")[-59:]
    '<|im_start|>user\\nWhat now?<|im_end|>\\n<|im_start|>assistant\\n'
    ```
    """
    if getattr(tokenizer, "chat_template", None):
        return _from_template(tokenizer, question, system, history)
    # Of seven plain forms (bare, "Q:/A:", a line of introduction or an example in front ...) none made the replies of
    # three scenarios likelier to Gemma 3 270M than this one; without BOS they lose two nats per token.
    turns = [f"Question: {asked}\nAnswer:{format_reply(tokenizer, reply)}\n\n" for asked, reply in history]
    return _bos(tokenizer) + (f"{system}\n\n" if system else "") + "".join(turns) + f"Question: {question}\nAnswer:"


def format_reply(tokenizer: PreTrainedTokenizerBase, reply: str) -> str:
    """A reply as it is appended to a prompt of [`format_prompt`].

    White space around it is dropped. After a chat template it follows directly; in the plain form it begins with a
    space, as words do in running text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer of the model.
        reply (`str`):
            The reply.

    Returns:
        `str`: the text to append.

    Example:

    ```py
    >>> from neva_hf.base import load_base
    >>> from neva_hf.prompts import format_reply
    >>> model, tokenizer = load_base()
    >>> format_reply(tokenizer, " Go and see a friend.")
    'Go and see a friend.'
    ```
    """
    return reply.strip() if getattr(tokenizer, "chat_template", None) else " " + reply.strip()


def _from_template(
    tokenizer: PreTrainedTokenizerBase, question: str, system: str | None, history: Sequence[tuple[str, str]]
) -> str:
    from jinja2 import TemplateError

    turns: list[dict[str, str]] = []
    for asked, reply in history:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    turns.append({"role": "user", "content": question})
    # Templates ignore variables that they do not know; Qwen3's then closes the empty thought before the reply.
    options = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
    if not system:
        return tokenizer.apply_chat_template(turns, **options)
    try:
        return tokenizer.apply_chat_template([{"role": "system", "content": system}, *turns], **options)
    # Gemma's template raises for a system message.
    except TemplateError:
        turns[0]["content"] = f"{system}\n\n{turns[0]['content']}"
        return tokenizer.apply_chat_template(turns, **options)


def _bos(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-text token, where the tokenizer would put one by itself."""
    starts = tokenizer("").input_ids[:1]
    return tokenizer.bos_token if starts and starts[0] == tokenizer.bos_token_id else ""
