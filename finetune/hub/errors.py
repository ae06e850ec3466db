"""Errors of the Hub's client: retried if that can help, else turned into one sentence.

The input is at fault for 401, 403 and 404 (exit 2), the network or the Hub for the rest (exit 1).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from finetune.errors import FinetuneError, InputError
from finetune.hub.guard import install
from finetune.utils.secrets import redact

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

T = TypeVar("T")

ATTEMPTS = 4  # around a call in which huggingface_hub has already retried what it can
TRANSIENT = (408, 429, 500, 502, 503, 504)
LONGEST_WAIT_SECONDS = 60.0
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


def retried(call: Callable[[], T], say: Callable[[str], None], wait: Callable[[float], None]) -> T:
    """Retry `call` after a busy Hub or a dropped connection; huggingface_hub itself retries only some requests.

    Repeating a commit whose answer was lost is safe: the files are already there, so nothing is committed again.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, ATTEMPTS):
        seconds = float(2**attempt)
        try:
            with _unwrapped():
                return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in TRANSIENT:
                raise
            asked = error.response.headers.get("Retry-After", "")
            seconds = float(asked) if asked.isdecimal() else seconds
            reason = f"status {error.response.status_code}"
        except httpx2.TransportError:
            reason = "a dropped connection"
        except json.JSONDecodeError:
            reason = "an error page"  # the client parses the body as JSON before it checks the status
        seconds = min(seconds, LONGEST_WAIT_SECONDS)
        say(f"the Hub: {reason}; trying again in {seconds:.0f} s ({attempt} of {ATTEMPTS - 1})")
        wait(seconds)
    with _unwrapped():
        return call()


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the cause of a failed transfer in place of the client's wrapper around it."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except (RuntimeError, LocalEntryNotFoundError) as error:
        if isinstance(error.__cause__, (HfHubHTTPError, httpx2.TransportError)):
            raise error.__cause__ from None
        raise


@contextmanager
def sentences(action: str, repo_id: str, repo_type: str) -> Iterator[None]:
    """Turn an error of the client into InputError or FinetuneError with one sentence."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    install()
    what = f"cannot {action} {repo_type} {repo_id}" if action != "push to" else f"cannot push to {repo_id}"
    try:
        yield
    except HfHubHTTPError as error:
        raise _of_status(error, what, repo_id, repo_type) from error
    except OfflineModeIsEnabled as error:
        raise FinetuneError(f"{what}: HF_HUB_OFFLINE is set") from error
    except httpx2.TransportError as error:
        raise FinetuneError(
            f"{what}: no connection to the Hub ({type(error).__name__}); check the network and run this again"
        ) from error
    except HFValidationError as error:
        raise InputError(f"{what}: not a valid repository name: {_first_line(error)}") from error
    except json.JSONDecodeError as error:
        raise FinetuneError(f"{what}: the Hub answered with an error page; try again later") from error
    except ValueError as error:
        raise InputError(f"{what}: {_first_line(error)}") from error
    except (OSError, RuntimeError) as error:  # Xet transfers raise RuntimeError
        raise FinetuneError(f"{what}: {_first_line(error)}") from error


def _of_status(error: HfHubHTTPError, what: str, repo_id: str, repo_type: str) -> FinetuneError:
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"
    status = error.response.status_code
    anonymous = get_token() is None
    if isinstance(error, GatedRepoError):
        first = f"{LOG_IN}, then accept" if anonymous else "accept"
        return InputError(f"{what}: it is gated; {first} its terms at {page}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"{what}: there is no such revision; see {page}/commits/main")
    if isinstance(error, DisabledRepoError):
        return InputError(f"{what}: the Hub has disabled it")
    if status == 401 and not anonymous and error.response.headers.get("X-Error-Code") != "RepoNotFound":
        return InputError(f"{what}: the Hub does not accept the token (401); {LOG_IN}")
    if status in (401, 404):
        hint = f"; if it is private, {LOG_IN}" if anonymous else " for the account whose token is set"
        return InputError(f"{what}: there is no such repository{hint} ({status})")
    if status == 403:
        return InputError(f"{what}: the token lacks this permission (403); grant it at {tokens_page()}")
    if status == 409:
        return FinetuneError(f"{what}: the repository is being changed by another client (409); run this again")
    if status == 429:
        return FinetuneError(f"{what}: the Hub's rate limit is reached (429); try again in some minutes")
    if status >= 500:
        return FinetuneError(f"{what}: server error of the Hub ({status}); try again later")
    kind = InputError if status in (400, 402, 413, 422) else FinetuneError
    return kind(f"{what}: the Hub refused with status {status}: {_first_line(error.server_message or '')}")


def tokens_page() -> str:
    """Return the URL of the page on which the permissions of a token are edited."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/settings/tokens"


def _first_line(text: object) -> str:
    lines = [line.strip() for line in redact(str(text)).splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or "no reason given"
