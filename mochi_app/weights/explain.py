"""Turns errors of the Hub into messages that say what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from mochi_app.errors import one_line
from mochi_app.weights.events import WeightsError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError


def transient(error: Exception) -> bool:
    """Whether the same request may succeed shortly."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429, 500, 502, 503, 504)
    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.ProxyError)


# What went wrong, and what to do


def hub_name() -> str:
    """The Hub's address for people: without a user or token that HF_ENDPOINT may contain."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@contextlib.contextmanager
def explained(repo: str, root: Path) -> Iterator[None]:
    """Turn what huggingface_hub, the network and the disk raise into `WeightsError`."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HFValidationError:
        raise WeightsError(
            f"{repo!r} is neither a folder nor a model of the Hub such as genmo/mochi-1-preview: "
            "check MOCHI_MODEL",
            retry=False,
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        causes: list[BaseException] = [error]
        while (cause := causes[-1].__cause__) is not None:
            causes.append(cause)
        refusals = [cause for cause in causes if isinstance(cause, HfHubHTTPError)]
        raise (
            explain_refusal(refusals[0], repo) if refusals else explain_failure(causes, root)
        ) from error


def explain_refusal(error: HfHubHTTPError, repo: str) -> WeightsError:
    """What an error response of the Hub means."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    hub, status = hub_name(), error.response.status_code
    if isinstance(error, GatedRepoError):
        what = f"{repo} is gated: accept its terms at {hub}/{repo}, then set HF_TOKEN to a token "
        return WeightsError(f"{what}of that account", retry=False)
    if isinstance(error, RepositoryNotFoundError):
        what = f"{hub} has no model {repo}, or it is private: check MOCHI_MODEL; a private one "
        return WeightsError(f"{what}needs HF_TOKEN", retry=False)
    if status in (401, 403):
        what = f"{hub} refuses the token (status {status}): set HF_TOKEN to a valid one that may "
        return WeightsError(f"{what}read {repo}, or unset it", retry=False)
    if status in (404, 416):
        what = f"{hub} has another {repo} than it listed a moment ago (status {status})"
        return WeightsError(f"{what}: start again", retry=True)
    later = transient(error)
    advice = "try again later" if later else "check HF_ENDPOINT and the proxy"
    return WeightsError(f"{hub} answers {repo} with status {status}: {advice}", retry=later)


def explain_failure(causes: Sequence[BaseException], root: Path) -> WeightsError:
    """What an error of the network or the disk means, given as its chain of causes."""
    import httpx2

    number = next((cause.errno for cause in causes if isinstance(cause, OSError)), None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        what = f"the disk of {root} is full: free some or set HF_HOME to a folder on another disk; "
        return WeightsError(f"{what}what has come so far is kept", retry=True)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"{root} cannot be written ({one_line(causes[0], paths=True)})"
        return WeightsError(f"{what}: set HF_HOME to a folder of this user", retry=False)
    if any(isinstance(cause, httpx2.HTTPError) for cause in causes):
        what = f"{hub_name()} cannot be reached ({one_line(causes[-1])})"
        return WeightsError(f"{what}: check the network, the proxy and HF_ENDPOINT", retry=True)
    what = f"the download stopped: {one_line(causes[0], paths=True)}"
    return WeightsError(f"{what}; look at the disk of {root}", retry=True)
