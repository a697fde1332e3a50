import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from utils.llm import LLMLoadError, hub

ANSWERS = hub.hub_answers


def refusal(kind: type[Exception], status: int) -> Exception:
    """A hub error without the machinery of a real response."""
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)
    return error


def raising(error: BaseException):
    def download(*_, **__):
        raise error

    return download


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(hub, "hub_answers", lambda endpoint: True)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)


def test_an_unreachable_hub_fails_fast_and_is_asked_once(caplog):
    start = time.monotonic()
    # a port of this machine where nobody listens
    assert not ANSWERS("http://127.0.0.1:9")
    assert not ANSWERS("http://127.0.0.1:9")
    assert time.monotonic() - start < 2
    assert caplog.text.count("out of reach") == 1


def test_a_silent_hub_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.1)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: time.sleep(2))
    start = time.monotonic()
    assert not ANSWERS("http://silent.invalid")
    assert time.monotonic() - start < 1
    assert "no answer in 0.1 s" in caplog.text


def test_offline_mode_asks_nothing(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True)
    monkeypatch.setattr(hub, "hub_answers", raising(AssertionError("asked")))
    assert not hub.hub_has("org/model", None)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (refusal(errors.GatedRepoError, 403), hub.GatedError, "org/model is gated: accept its terms"),
        (refusal(errors.HfHubHTTPError, 401), hub.GatedError, "refuses org/model"),
        (refusal(errors.RepositoryNotFoundError, 404), LLMLoadError, "no model 'org/model' on the hub"),
        (refusal(errors.RevisionNotFoundError, 404), LLMLoadError, "no revision 'abc'"),
        (refusal(errors.HfHubHTTPError, 503), LLMLoadError, "answers status 503"),
    ],
)
def test_refusals_become_one_line_with_a_remedy(reachable, monkeypatch, error, kind, message):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    with pytest.raises(kind, match=message) as caught:
        hub.hub_has("org/model", "abc")
    assert "\n" not in str(caught.value)


def test_a_hub_lost_after_the_probe_counts_as_unreachable(reachable, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(errors.LocalEntryNotFoundError("lost")))
    assert not hub.hub_has("org/model", None)
