import errno
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.run import CONFIGS
from utils.llm import load_model, load_tokenizer
from utils.llm.errors import TooLittleMemoryError, lacks_memory
from utils.settings import compose, differing, fingerprint, model_settings, one_line, tokenizer_settings

ALLOCATOR = "CUDA out of memory. Tried to allocate 1.02 GiB. GPU 1 has a total capacity of 79.18 GiB. Process 1 has"


def wrapped(cause: Exception) -> Exception:
    error = RuntimeError("a step failed")
    error.__cause__ = cause
    return error


def failed_recording(cause: Exception) -> Exception:
    """What a block raises whose end fails because its body has."""

    @contextmanager
    def recording() -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(RuntimeError) as caught, recording():
        raise cause
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(ALLOCATOR),
        RuntimeError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs"),
        TooLittleMemoryError("memory: 3 GB of 2 GB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400000000000000 bytes"),
        MemoryError(),
        wrapped(torch.OutOfMemoryError(ALLOCATOR)),
        failed_recording(torch.OutOfMemoryError(ALLOCATOR)),
        wrapped(failed_recording(torch.OutOfMemoryError(ALLOCATOR))),
    ],
)
def test_a_want_of_memory_is_known(error):
    assert lacks_memory(error)


def in_its_stead(cause: Exception) -> Exception:
    """An error that says it has nothing to do with the one before."""
    try:
        raise cause
    except Exception:
        try:
            raise RuntimeError("no") from None
        except RuntimeError as error:
            return error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"),
        OSError("out of memory"),
        wrapped(ValueError("no")),
        failed_recording(ValueError("no")),
        in_its_stead(torch.OutOfMemoryError(ALLOCATOR)),
    ],
)
def test_other_errors_are_no_want_of_memory(error):
    assert not lacks_memory(error)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ALLOCATOR, "CUDA out of memory. Tried to allocate 1.02 GiB"),
        (
            "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs",
            "CUDA error: out of memory",
        ),
        ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_want_of_memory_is_one_line_with_the_remedies(text, said):
    expected = f"error: {said}: set quantization=nf4, llm.gradient_checkpointing=true, a smaller train.batch_size"
    assert one_line(RuntimeError(text), Path()).startswith(expected)


def test_a_full_disk_is_one_line_with_the_remedy():
    said = one_line(OSError(errno.ENOSPC, "No space left on device"), Path())
    assert said == "error: no space is left on a disk that is written to: make some, then go on as after a kill"
    assert "/x/y: No space left" in one_line(OSError(errno.ENOSPC, "No space left on device", "/x/y"), Path())


def test_a_recording_that_failed_for_want_of_memory_says_so():
    said = one_line(failed_recording(torch.OutOfMemoryError(ALLOCATOR)), Path())
    assert said.startswith("error: CUDA out of memory. Tried to allocate 1.02 GiB: set quantization=nf4")
    plan = wrapped(TooLittleMemoryError("memory: 3 GB of 2 GB: set x"))
    assert one_line(plan, Path()) == "error: memory: 3 GB of 2 GB: set x"


def test_an_error_without_words_is_named():
    assert one_line(MemoryError(), Path()).startswith("error: out of memory: set quantization=nf4")


def test_the_plan_of_memory_says_its_own_remedies_once():
    assert one_line(TooLittleMemoryError("memory: 3 GB of 2 GB: set x"), Path()) == "error: memory: 3 GB of 2 GB: set x"


def test_settings_that_differ_are_named_with_both_values():
    before = {"seed": 0, "opt": {"lr": 0.1, "betas": [0.9, 0.99]}, "peft": {"r": 8}}
    assert differing(before, {"peft": {"r": 8}, "opt": {"betas": [0.9, 0.99], "lr": 0.1}, "seed": 0}) == []
    assert differing(before, {"seed": None, "opt": {"lr": 0.2, "betas": [0.9, 0.99]}, "peft": {}}) == [
        "opt.lr is 0.1 there and 0.2 now",
        "peft is 'absent' there and {} now",
        "peft.r is 8 there and 'absent' now",
        "seed is 0 there and None now",
    ]


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "llm").glob("*.yaml")))
def test_a_configuration_of_a_model_is_what_loading_takes(name):
    cfg = compose(CONFIGS, [f"llm={name}", "paths.output_dir=unused", "llm.name_or_path=org/model"])
    assert tokenizer_settings(cfg).keys() == inspect.signature(load_tokenizer).parameters.keys()
    left = inspect.signature(load_model).parameters.keys() - model_settings(cfg).keys()
    assert left == {"dtype", "device", "quantization"}


def test_a_run_may_go_on_with_other_settings_of_its_evaluation():
    def of(*overrides: str):
        return fingerprint(compose(CONFIGS, ["method=sgp_temperature", "paths.output_dir=x", *overrides]))

    begun = of()
    assert "maximum" in begun["method"]["factory"]
    assert of("eval.n_mc=100", "eval.batch_size=3") == begun
    assert of("method.factory.draws=100") != begun
    assert of("method.factory.maximum=3") != begun
    assert of("eval.keep=best", "eval.every=epoch") != begun
