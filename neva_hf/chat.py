"""`neva chat`: dial values while chatting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.markup import escape

from .errors import NeVAError
from .model import NeVAModel
from .strengths import parse_strengths
from .talk import DEFAULT_OPTIONS, AnswerOptions, answers, stream_answer

HELP = """Type a question, or a command:
  /set VALUE NUMBER   turn a dial: /set benevolence 1.5
  /values             the dials, their settings and fluent ranges
  /reset              all dials to 0
  /compare            the last question once more: the base model beside the dials (/compare QUESTION for another)
  /clear              forget the conversation
  /help               this text
  /quit               leave (so does Ctrl-D)"""


@dataclass
class ChatState:
    """A conversation and its dials.

    Args:
        strengths (`dict[str, float]`): The dials that are not at 0.
        history (`list[tuple[str, str]]`): Questions and answers so far.
        last_question (`str`): The last question, for `/compare`.
    """

    strengths: dict[str, float] = field(default_factory=dict)
    history: list[tuple[str, str]] = field(default_factory=list)
    last_question: str = ""


def chat(
    console: Console,
    model: NeVAModel,
    tokenizer: Any,
    read: Callable[[], str],
    *,
    strengths: dict[str, float] | None = None,
    options: AnswerOptions = DEFAULT_OPTIONS,
) -> ChatState:
    """Talks until there is nothing more to read.

    Args:
        console (`Console`): Where to write.
        model ([`NeVAModel`]): The model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        read (`Callable[[], str]`): Gives the next line; raises `EOFError` at the end.
        strengths (`dict[str, float]`, *optional*): Settings to begin with.
        options ([`AnswerOptions`]): How answers are made.

    Returns:
        [`ChatState`]: How it ended.
    """
    parse_strengths(strengths, model.values)
    state = ChatState(strengths={name: s for name, s in (strengths or {}).items() if s != 0})
    console.print(HELP, style="dim")
    while True:
        try:
            line = read().strip()
        except EOFError:
            return state
        if not line:
            continue
        try:
            if line in ("/quit", "/exit"):
                return state
            if line.startswith("/"):
                _command(console, model, tokenizer, state, line, options)
            else:
                _answer(console, model, tokenizer, state, line, options)
        except NeVAError as error:
            # A slip of the keyboard must not end the conversation.
            console.print(f"[red]{escape(' '.join(str(error).split()))}[/]")
        except KeyboardInterrupt:
            console.print("\n(stopped)", style="dim")


def _answer(
    console: Console, model: NeVAModel, tokenizer: Any, state: ChatState, question: str, options: AnswerOptions
) -> None:
    state.last_question = question

    def write(piece: str) -> None:
        console.print(piece, end="", markup=False, soft_wrap=True)

    answer = stream_answer(model, tokenizer, question, state.strengths, write, history=state.history, options=options)
    console.print()
    state.history.append((question, answer))


def _command(
    console: Console, model: NeVAModel, tokenizer: Any, state: ChatState, line: str, options: AnswerOptions
) -> None:
    command, _, rest = line.partition(" ")
    rest = rest.strip()
    if command == "/help":
        console.print(HELP, style="dim")
    elif command == "/set":
        _set(console, model, state, rest)
    elif command == "/values":
        _show_values(console, model, state)
    elif command == "/reset":
        state.strengths.clear()
        console.print("All dials are at 0.")
    elif command == "/clear":
        state.history.clear()
        console.print("The conversation begins anew.")
    elif command == "/compare":
        question = rest or state.last_question
        if not question:
            raise NeVAError("There is no question to compare yet: type one, or /compare QUESTION.")
        # The last question is not its own history (and never was, if its answer was stopped).
        answered = state.history and state.history[-1][0] == question
        history = state.history[:-1] if answered and not rest else state.history
        base, edited = answers(model, tokenizer, question, [{}, state.strengths], history=history, options=options)
        console.print("[bold]base model[/]")
        console.print(base, markup=False)
        console.print(f"[bold]{escape(_settings(state))}[/]")
        console.print(edited, markup=False)
    else:
        raise NeVAError(f"There is no command {command!r}; /help lists them.")


def _set(console: Console, model: NeVAModel, state: ChatState, rest: str) -> None:
    name, _, number = rest.replace("=", " ").partition(" ")
    try:
        strength = float(number)
    except ValueError:
        raise NeVAError(f"Write /set VALUE NUMBER, such as /set {model.values[0]} 1.5 (got {rest!r}).") from None
    ranges = {key: pair for config in model.peft_config.values() for key, pair in config.ranges.items()}
    parse_strengths({name: strength}, model.values, ranges=ranges)
    state.strengths.pop(name, None)
    if strength != 0:
        state.strengths[name] = strength
    console.print(escape(_settings(state)))


def _settings(state: ChatState) -> str:
    return ", ".join(f"{name} {s:+g}" for name, s in state.strengths.items()) or "all dials at 0"


def _show_values(console: Console, model: NeVAModel, state: ChatState) -> None:
    ranges = {key: pair for config in model.peft_config.values() for key, pair in config.ranges.items()}
    for value in model.values:
        span = f"fluent from {ranges[value][0]:g} to {ranges[value][1]:g}" if value in ranges else ""
        console.print(f"  {value:<24}{state.strengths.get(value, 0.0):+6.2f}   {span}", markup=False)
