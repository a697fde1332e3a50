"""The Hugging Face hub: is it there, may this model be read, and what the local hub cache holds."""

import functools
import logging
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from utils.llm.errors import LLMLoadError

logger = logging.getLogger(__name__)

PROBE_SECONDS = 4.0
"""Wall time (seconds) that an unreachable hub may cost a process, name look-up included."""


class GatedError(LLMLoadError):
    """The hub knows the model but does not give it to this user."""


@functools.cache
def hub_answers(endpoint: str) -> bool:
    """Ask `endpoint` once per process whether it answers; costs `PROBE_SECONDS` at most.

    The hub client's own calls retry for half a minute when there is no network, hence this probe. It runs
    in a daemon thread because a name look-up cannot be interrupted.
    """
    answer: list[str] = []

    def ask() -> None:
        try:
            status = huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS).status_code
        except Exception as error:  # the client's error classes differ between its versions
            answer.append(str(error) or type(error).__name__)
        else:
            answer.append("" if status < 500 else f"status {status}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    reason = answer[0] if answer else f"no answer in {PROBE_SECONDS:g} s"
    if reason:
        logger.warning("%s is out of reach (%s): looking for local copies", endpoint, reason)
    return not reason


def hub_has(name: str, revision: str | None) -> bool:
    """Whether the hub is reachable and gives `name` to this user (its config.json is fetched to see).

    Returns:
        False where the hub is offline or out of reach.

    Raises:
        GatedError: The model is there, but access to it must be asked for.
        LLMLoadError: The hub does not know the model or the revision, or refuses with another status.
    """
    if huggingface_hub.is_offline_mode() or not hub_answers(constants.ENDPOINT):
        return False
    try:
        huggingface_hub.hf_hub_download(name, "config.json", revision=revision)
    except GatedRepoError as error:
        raise GatedError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{name}, then run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise LLMLoadError(f"{name} has no revision {revision!r}: see {constants.ENDPOINT}/{name}/commits") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise LLMLoadError(
            f"no model {name!r} on the hub: check llm.name_or_path, or run `hf auth login` if it is private"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return False
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise GatedError(
                f"the hub refuses {name} (status {status}): check your token with `hf auth whoami`"
            ) from error
        raise LLMLoadError(f"the hub answers status {status} for {name}: try again later") from error
    return True


def hub_cache_folder(name: str, revision: str | None) -> Path | None:
    """The snapshot folder of `name` in the ordinary hub cache, whole or not; None where there is none."""
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(config).parent if isinstance(config, str) else None
