"""Checkpoints: round trip, atomicity, damage, foreign configs."""

import enum
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.checkpoint import FILE, FOLDER, load_checkpoint, save_checkpoint

FINGERPRINT = {"seed": 0, "llm": {"name": "tiny", "dtype": "float32"}, "targets": ["q_proj", "v_proj"], "lr": 1e-3}


def make_training(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.nn.Parameter(torch.randn(4, 3, generator=generator))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return weight, optimizer, scheduler, generator


def train(weight, optimizer, scheduler, generator, steps: int) -> None:
    for _ in range(steps):
        loss = (weight + torch.randn(4, 3, generator=generator)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()


def state_of(weight, optimizer, scheduler, generator, step: int = 0) -> dict:
    return {
        "parameters": {"w": weight},
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "step": step,
        "epoch": 1,
        "batch": 2,
        "rng": generator.get_state(),
        "best": np.float64(0.5),
        "fingerprint": FINGERPRINT,
    }


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    training = make_training()
    train(*training, steps=3)
    save_checkpoint(tmp_path, state_of(*training, step=3))
    train(*training, steps=4)
    expected = training[0].detach().clone()

    weight, optimizer, scheduler, generator = make_training(seed=1)
    state = load_checkpoint(tmp_path, FINGERPRINT)
    assert state is not None
    weight.data.copy_(state["parameters"]["w"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    generator.set_state(state["rng"])
    train(weight, optimizer, scheduler, generator, steps=4)
    assert torch.equal(weight, expected)
    assert (state["step"], state["epoch"], state["batch"], state["best"]) == (3, 1, 2, 0.5)


def test_missing_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path, FINGERPRINT) is None
    assert load_checkpoint(tmp_path / "absent", FINGERPRINT) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 2e-3}, "lr is 0.001 there and 0.002 now"),
        ({"llm": {"name": "other", "dtype": "float32"}}, "llm.name is 'tiny' there and 'other' now"),
        ({"targets": ["q_proj"]}, r"targets is \['q_proj', 'v_proj'\] there"),
        ({"rank": 8}, "rank is 'absent' there and 8 now"),
    ],
)
def test_other_config_is_refused_by_key(tmp_path, change, message):
    save_checkpoint(tmp_path, {"fingerprint": FINGERPRINT})
    with pytest.raises(ValueError, match=f"state.pt belongs to another config: {message}"):
        load_checkpoint(tmp_path, FINGERPRINT | change)


def test_every_truncation_and_a_flipped_bit_are_detected(tmp_path):
    save_checkpoint(tmp_path, {"fingerprint": FINGERPRINT, "w": torch.ones(50)})
    path = tmp_path / FOLDER / FILE
    whole = path.read_bytes()
    for size in (0, 10, 40, 95, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"state\.pt (is damaged|is no checkpoint|has checkpoint version)"):
            load_checkpoint(tmp_path, FINGERPRINT)
    path.write_bytes(whole[:-200] + bytes([whole[-200] ^ 1]) + whole[-199:])
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_checkpoint(tmp_path, FINGERPRINT)


def test_foreign_files_and_other_versions_are_refused(tmp_path):
    save_checkpoint(tmp_path, {"fingerprint": FINGERPRINT})
    path = tmp_path / FOLDER / FILE
    path.write_bytes(path.read_bytes().replace(b" 2 ", b" 7 ", 1))
    with pytest.raises(ValueError, match="checkpoint version 7, this program reads 2"):
        load_checkpoint(tmp_path, FINGERPRINT)
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"no checkpoint of this program .* delete the folder"):
        load_checkpoint(tmp_path, FINGERPRINT)


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize("value", [object(), {1}, Colour.RED, lambda: 0])
def test_what_could_not_be_loaded_is_refused_when_saving(tmp_path, value):
    save_checkpoint(tmp_path, {"fingerprint": {}, "step": 1})
    with pytest.raises(TypeError, match=r"state\.scheduler\.base\[1\] is a "):
        save_checkpoint(tmp_path, {"fingerprint": {}, "scheduler": {"base": [0, value]}})
    state = load_checkpoint(tmp_path, {})
    assert state is not None
    assert state["step"] == 1


def test_fingerprint_is_required(tmp_path):
    with pytest.raises(KeyError, match="fingerprint"):
        save_checkpoint(tmp_path, {"step": 1})


def test_views_are_saved_without_their_storage(tmp_path):
    save_checkpoint(tmp_path, {"fingerprint": {}, "w": torch.zeros(10**6)[:3]})
    assert (tmp_path / FOLDER / FILE).stat().st_size < 10_000


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_failed_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path, {"fingerprint": {}, "step": 1})

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="disk gone"):
            save_checkpoint(tmp_path, {"fingerprint": {}, "step": 2})
    state = load_checkpoint(tmp_path, {})
    assert state is not None
    assert state["step"] == 1
    assert os.listdir(tmp_path / FOLDER) == [FILE]


KILLED_BEFORE_REPLACE = """
import os, signal, sys
from utils.checkpoint import save_checkpoint
save_checkpoint(sys.argv[1], {"fingerprint": {}, "step": 1})
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(sys.argv[1], {"fingerprint": {}, "step": 2})
"""


def test_kill_between_write_and_replace(tmp_path):
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED_BEFORE_REPLACE, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / FOLDER)) == 2  # the unfinished file is left behind, and ignored
    state = load_checkpoint(tmp_path, {})
    assert state is not None
    assert state["step"] == 1
    for path in (tmp_path / FOLDER).iterdir():
        os.utime(path, (0, 0))
    save_checkpoint(tmp_path, {"fingerprint": {}, "step": 3})
    assert os.listdir(tmp_path / FOLDER) == [FILE]
