"""What goes wrong with the Hugging Face Hub, as sentences that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import NeVAError

# The HTTP client's own base class: huggingface_hub changed clients between its versions, and its errors derive from it.
TransportError: type[Exception] = HfHubHTTPError.__mro__[1]

_LOG_IN = "Log in with `hf auth login`, or pass a token"


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later: a lost connection, or a Hub that is in trouble.

    Args:
        error (`BaseException`): What a call of huggingface_hub raised.

    Returns:
        `bool`: Whether to try again.
    """
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    return isinstance(error, TransportError) or (isinstance(error, ConnectionError) and not _is_offline(error))


def explained(error: BaseException, what: str, writing: bool = False) -> NeVAError:
    """What an error of huggingface_hub means for the person who asked.

    Args:
        error (`BaseException`): The error.
        what (`str`): What was wanted, as the beginning of a sentence: "The neuron map 'user/map' could not be read".
        writing (`bool`): Whether the Hub was to be changed; nothing was, where this is raised.

    Returns:
        [`NeVAError`]: With what was wrong and what to do.
    """
    return NeVAError(f"{what}: {_reason(_root(error), writing)}")


@contextmanager
def hub_errors(what: str, writing: bool = False) -> Iterator[None]:
    """Raises what huggingface_hub raises inside as a `NeVAError`, see [`explained`].

    Raises:
        `NeVAError`: With the original error as its cause.
    """
    try:
        yield
    except NeVAError:
        raise
    # RuntimeError: hf-xet's. ValueError: ids and metadata that are refused, answers that are no JSON.
    except (TransportError, OSError, ValueError, RuntimeError) as error:
        raise explained(error, what, writing) from error


def _root(error: BaseException) -> BaseException:
    """The error that says most: behind "nothing in the cache either" or "an upload failed" stands why."""
    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_offline(error: BaseException) -> bool:
    return isinstance(error, OfflineModeIsEnabled) or bool(constants.HF_HUB_OFFLINE)


def _reason(error: BaseException, writing: bool) -> str:
    # The order matters: a gated repository is a kind of missing one.
    if isinstance(error, HFValidationError):
        return (
            "this cannot be the id of a repository on the Hub. Write it as user/name: letters, digits, '-', '_', '.'."
        )
    if isinstance(error, LocalTokenNotFoundError):
        return f"you are not logged in. {_LOG_IN}."
    if isinstance(error, GatedRepoError):
        return f"the repository is gated. Accept its conditions on its page on the Hub, then {_LOG_IN.lower()}."
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such revision. Check it against the branches, tags and commits on the Hub."
    if isinstance(error, RepositoryNotFoundError):
        return (
            "the Hub has no such repository, or it is private and your token does not open it. Check the spelling. "
            f"{_LOG_IN} that may {'write to' if writing else 'read'} it."
        )
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "not all of it is in the cache, and the Hub was not asked. "
            + ("HF_HUB_OFFLINE is set: unset it" if constants.HF_HUB_OFFLINE else "Drop local_files_only (--offline)")
            + " once, while there is a network; or name a folder."
        )
    if isinstance(error, EntryNotFoundError):
        return f"a file is missing in the repository ({_line(error)})."
    if isinstance(error, HfHubHTTPError):
        return _status(error, writing)
    if _is_offline(error):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it and try again."
    if isinstance(error, (TransportError, ConnectionError, TimeoutError)):
        return f"the connection to the Hub failed or was lost ({_line(error)}). " + (
            "Nothing half-done is visible there; run the same again." if writing else "Check it and try again."
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror or type(error).__name__}: {error.filename}. Check the disk and the permissions."
    return f"{_line(error)}."


def _status(error: HfHubHTTPError, writing: bool) -> str:
    status = error.response.status_code
    said = _line(error.server_message) if error.server_message else f"HTTP status {status}"
    if status == 401:
        return f"the Hub does not know you, or your token is not valid ({said}). {_LOG_IN}."
    if status == 403:
        if writing:
            return (
                f"your token may not write there ({said}). Use one with the role 'write', or open a pull request instead: "
                "create_pr=True, --create-pr."
            )
        return f"your token may not read this ({said}). Use one with the role 'read' for this repository."
    if status in (409, 412):
        return f"the repository was changed at the same time ({said}). Run the same again."
    if status == 413:
        return f"the Hub finds the upload too large ({said})."
    if status == 429:
        return f"the Hub asks for fewer requests ({said}). Wait some minutes and run the same again."
    if status >= 500:
        return f"the Hub is in trouble ({said}). Try again later; https://status.huggingface.co says how it is."
    return f"the Hub refused the request ({said})."


def _line(error: object) -> str:
    """The words of an error in one line without what a terminal would obey; it may come from a server."""
    words = " ".join(str(error).split()) or type(error).__name__
    return "".join(sign for sign in words if sign.isprintable())[:300].rstrip(".")
