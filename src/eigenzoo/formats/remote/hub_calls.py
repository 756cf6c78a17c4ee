"""Calls to the Hugging Face hub: tried again while they may still succeed, and told in our own words when they do not.

huggingface_hub resumes a body that breaks and waits where a file's request is refused for now; what it gives up is tried
anew here, with the delay that the hub asks for. Tokens are in no text: what is said is said of ids, and of statuses.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Event
from typing import TypeVar

from tenacity import RetryCallState, RetryError

from eigenzoo.errors import EigenzooError, FormatError
from eigenzoo.formats.remote.address import scrubbed, shown_url
from eigenzoo.formats.remote.hub_id import HubId
from eigenzoo.formats.remote.retrying import Stopped, asked_to_wait, failure, repeat, status_of

Answer = TypeVar("Answer")

ATTEMPTS, UNREACHED = 4, 2
"""Attempts, and those where not even a connection is made: a path that is mistyped should be told soon without a network."""

FIRST_DELAY = 1.0

_CONNECT, _CACHED = "check the connection and run it again", "; models in the cache need no connection"
_LATER = "run it again later"

_BROKEN = (ConnectionError, TimeoutError, RuntimeError)
"""What Python and the hub's own storage call a way that is broken."""

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


def persist(
    call: Callable[[], Answer],
    hub_id: HubId,
    *,
    local_too: bool = False,
    writing: bool = False,
    stopped: Event | None = None,
) -> Answer:
    """Call, and call again while the fault may pass; raises FormatError for what lasts.

    Args:
        call: a request to the hub by huggingface_hub.
        hub_id: the repository or folder that the error is about.
        local_too: whether the id could have been meant as a path of this machine, which the error then says.
        writing: whether it is part of a push, which no cache can stand in for.
        stopped: ends all attempts, in Stopped, when it is set.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return repeat(call, lasts=_lasts, stop=_gives_up, first_delay=FIRST_DELAY, stopped=stopped)
    except RetryError as error:
        if stopped is not None and stopped.is_set():
            raise Stopped from None
        cause = _cause(failure(error) or error)
    except (OSError, ValueError, RuntimeError, HfHubHTTPError.__bases__[0], _resolution_error()) as error:
        # The hub's own storage raises it, and an upload that wraps what it failed by; its subclasses are faults of a program.
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        cause = _cause(error)
    raise hub_error(cause, hub_id, local_too=local_too, writing=writing)


def _gives_up(state: RetryCallState) -> bool:
    error = failure(state)
    unreached = error is not None and type(_cause(error)).__name__ == "ConnectError"
    return state.attempt_number >= (UNREACHED if unreached else ATTEMPTS)


def _resolution_error() -> type[Exception]:
    from huggingface_hub.errors import RevisionResolutionError

    kind: type[Exception] = RevisionResolutionError
    return kind


def _cause(error: BaseException) -> BaseException:
    """Return what a request failed by, where huggingface_hub says instead that its cache has nothing either."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, IncompleteSnapshotError

    wrapped = isinstance(error, EntryNotFoundError | _resolution_error() | RuntimeError) and not isinstance(
        error, HfHubHTTPError
    )
    if wrapped and not isinstance(error, IncompleteSnapshotError) and error.__cause__ is not None:
        return _cause(error.__cause__)
    return error


def _lasts(error: BaseException) -> bool:
    """Tell whether a request will fail again; anything but a fault of a request does."""
    from huggingface_hub.errors import (
        FileMetadataError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
        return True
    error = _cause(error)
    status = status_of(error)
    if status is not None:
        return status not in PASSING
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError, FileMetadataError, _resolution_error())):
        return True
    if isinstance(error, (HfHubHTTPError.__bases__[0], *_BROKEN)):
        return False
    # A plain OSError: a number says what this machine lacks; without one it is a body of the wrong length.
    return not isinstance(error, OSError) or error.errno is not None


def hub_error(error: BaseException, hub_id: HubId, *, local_too: bool = False, writing: bool = False) -> EigenzooError:
    """Say a fault in our own words: what, where, the rule and the next step."""
    from huggingface_hub.errors import (
        FileMetadataError,
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where, status = str(hub_id), status_of(error)
    here = "there is no file or folder of this name here, and " if local_too else ""
    page = f"{endpoint()}/{hub_id.repo}"
    if isinstance(error, GatedRepoError):
        return FormatError(
            "the repository is gated, and this account may not read it",
            where=where,
            rule="reading it requires a login and accepted terms",
            next_step=f"accept the terms at {page}, then run `hf auth login`",
        )
    if isinstance(error, RepositoryNotFoundError):
        return FormatError(
            f"{here}the hub shows no such repository",
            where=where,
            rule="an id is org/name or org/name@revision; the hub shows a private repository only to accounts with access",
            next_step="check the name; for a private repository run `hf auth login` first",
        )
    if isinstance(error, RevisionNotFoundError):
        return FormatError(
            f"{here}the repository has no revision {hub_id.revision or 'main'!r}",
            where=where,
            rule="a revision is a branch, a tag or a commit",
            next_step=f"see {page}/tree/main for the revisions",
        )
    if isinstance(error, RemoteEntryNotFoundError) or status == 404:
        return FormatError("the repository has no such file", where=where, next_step=f"see {page}/tree/main")
    if status in (401, 403):
        return FormatError(
            f"the hub refuses the request (status {status})",
            where=where,
            rule="a token must be valid and have the right for this repository",
            next_step="run `hf auth login` with such a token, or ask the owner for access",
        )
    missing = (IncompleteSnapshotError, LocalEntryNotFoundError, OfflineModeIsEnabled, _resolution_error())
    if isinstance(error, missing) and not writing:
        return _not_cached(hub_id, here)
    if isinstance(error, HFValidationError):
        return FormatError(f"{here}this is not a hub id: {scrubbed(str(error))}", where=where)
    if status in (409, 412):
        return FormatError(
            f"the repository changed during the push (status {status})", where=where, next_step="run it again"
        )
    if status == 429:
        wait = asked_to_wait(error)
        return FormatError(
            "the hub refuses further requests for now (status 429)",
            where=where,
            next_step=(f"run it again in {wait:.0f} s" if wait else _LATER) + "; `hf auth login` raises the limit",
        )
    if status is not None:
        return FormatError(f"the hub fails (status {status})", where=where, next_step=_LATER)
    if isinstance(error, FileMetadataError):
        return FormatError(
            f"the server at {endpoint()} is not a hub", where=where, next_step="check HF_ENDPOINT and the proxy"
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _BROKEN):
        return FormatError(
            f"cannot be stored in the hub's cache ({error.strerror})",
            where=where,
            next_step="free some space, or set HF_HUB_CACHE to another folder",
        )
    if isinstance(error, OSError | ValueError) and not isinstance(error, _BROKEN):
        return FormatError(
            f"the hub's answer does not match its own listing ({type(error).__name__}: {scrubbed(str(error))})",
            where=where,
            rule="the answer was discarded",
            next_step=_LATER,
        )
    return FormatError(
        f"{here}the hub at {endpoint()} cannot be reached ({type(error).__name__})",
        where=where,
        next_step=_CONNECT + ("" if writing else _CACHED),
    )


def _not_cached(hub_id: HubId, here: str) -> FormatError:
    from huggingface_hub import constants

    offline = constants.is_offline_mode()
    why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
    return FormatError(
        f"{here}{why}, and the hub's cache does not have all of it",
        where=str(hub_id),
        rule=f"the cache is the folder {str(constants.HF_HUB_CACHE)!r}",
        next_step="run it once without HF_HUB_OFFLINE" if offline else _CONNECT + _CACHED,
    )


def endpoint() -> str:
    """Return the hub's address, without the secrets that it may hold."""
    from huggingface_hub import constants

    return shown_url(constants.ENDPOINT)
