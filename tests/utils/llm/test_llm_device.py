import pytest
import torch

from utils.llm import LLMLoadError, resolve_device, resolve_dtype

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpus(monkeypatch):
    def install(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return install


def test_devices(gpus, monkeypatch):
    gpus(2)
    assert resolve_device("auto") == resolve_device("cuda") == GPU
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == GPU
    gpus(0)
    assert resolve_device("auto") == resolve_device("cpu") == CPU


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("cuda", 0, "finds no GPU: use device=cpu"),
        ("cuda:2", 2, "the GPUs here are cuda:0 to cuda:1"),
        ("cdua", 1, "did you mean 'cuda'"),
        ("tpx9", 1, "use one of auto, cpu"),
    ],
)
def test_device_errors(gpus, name, count, message):
    gpus(count)
    with pytest.raises(LLMLoadError, match=message):
        resolve_device(name)


def test_dtypes(gpus):
    gpus(1)
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", GPU) == torch.bfloat16
    assert resolve_dtype("float16", GPU) == torch.float16
    gpus(1, (7, 5))
    assert resolve_dtype("auto", GPU) == torch.float32
    with pytest.raises(LLMLoadError, match="bfloat16: use dtype=float32"):
        resolve_dtype("bfloat16", GPU)
    with pytest.raises(LLMLoadError, match="did you mean 'bfloat16'"):
        resolve_dtype("bfloat", CPU)
