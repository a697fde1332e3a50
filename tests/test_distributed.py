"""Two processes on a CPU do what one does: the same batches, metrics and files, the KL once, resumable by one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import FAST, row

from pipeline.evaluation import finish
from pipeline.run import CONFIGS, load, prepare
from pipeline.training import train
from utils.checkpoint import FILE, FOLDER
from utils.distributed import World
from utils.run import read_metrics
from utils.settings import compose

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
UNEVEN = ("eval.batch_size=5", "train.batch_size=5")  # 11 training examples, 7 test examples
RUNS = {
    "mle": ("method=mle",),
    "mle_fsdp": ("method=mle", "train.fsdp=true"),
    "sgp": ("train.n_mc=2",),
    "sgp_fsdp": ("train.n_mc=2", "train.fsdp=true"),
    "sgp_ensemble": ("method=sgp_ensemble", "train.fsdp=true"),
    "tied": ("method=mle", "llm.architecture.tie_word_embeddings=true", "train.fsdp=true"),
    "adalora": ("method=adalora", "opt.lr=0.1", "method.factory.orthogonality=3"),
    "cut": ("method=mle",),
}

# a mesh is kept, as caches of torch's keep that of sharded weights; the threads of collectives then outlive the group
END = """
import sys, torch, torch.distributed as dist
from utils.distributed import World

world = World(torch.device("cpu"))
kept = dist.init_device_mesh("cpu", (2,))
sys.setswitchinterval(100)  # nobody gets the interpreter who is not given it
for _ in range(50):
    world.any(False)
world.close()
"""


def world(rank: int, size: int) -> World:
    made = World(CPU)
    made.rank, made.size = rank, size
    return made


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 16])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_shares_are_equal_in_number_and_cover_everything_once(n, size, batch_size):
    rows = [world(rank, size).rows(n) for rank in range(size)]
    assert {i for share in rows for i in share} == set(range(n))
    assert len({len(share) for share in rows}) == 1
    assert sum(map(len, rows)) < n + size
    assert [i for share in rows for i in share] == [*range(n), *[n - 1] * (sum(map(len, rows)) - n)]
    shares = [list(world(rank, size).micro_batches(list(range(n)), batch_size)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    weight = np.zeros(n)
    for micro, w in (part for share in shares for part in share):
        assert 1 <= len(micro) <= batch_size
        weight[micro] += w / len(micro)
    np.testing.assert_allclose(weight, 1 / n)


def command_line(folder: Path, name: str, *extra: str) -> list[str]:
    data = [f"dset.{split}_file={folder / split}.jsonl" for split in ("train", "validation", "test")]
    return [*FAST, *UNEVEN, *data, *RUNS[name], f"paths.output_dir={folder / name}", *extra]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """All runs once by one process and once by two."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("one", "two")}
    for folder in made.values():
        for split, numbers in {"train": range(11), "validation": range(20, 25), "test": range(30, 37)}.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row(i)) + "\n" for i in numbers))
    for name in RUNS:
        cfg = compose(CONFIGS, command_line(made["one"], name, "train.fsdp=false"))
        run = prepare(cfg)
        finish(run, train(run))
    work: list[dict[str, Any]] = [{"overrides": command_line(made["two"], name)} for name in RUNS]
    work[-1]["interrupt"] = 3
    (made["two"] / "stdout").write_text(by_two("tests/distributed_worker.py", json.dumps(work)))
    return made


def by_two(*command: str) -> str:
    """Standard output of a Python script run by two processes."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def finals(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    return {str(r["mc"]): r for r in read_metrics(folder / name) if r["kind"] == "final"}


def steps(folder: Path, name: str) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / name) if r["kind"] == "train"]


def scores(folder: Path, name: str, mc: str) -> np.ndarray:
    return np.load(folder / name / f"predictions_test_mc{mc}.npz")["logits"]


@pytest.mark.parametrize("name", ["mle", "mle_fsdp", "tied", "adalora"])
def test_without_noise_two_processes_train_and_predict_as_one(folders, name):
    for one, two in zip(steps(folders["one"], name), steps(folders["two"], name), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    for mc in ("zero_shot", "mean"):
        one, two = (scores(folders[k], name, mc) for k in ("one", "two"))
        assert one.shape == (1, 7, 3)
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-4)
    one, two = (finals(folders[k], name)["mean"] for k in ("one", "two"))
    assert {k: two[k] for k in ("nll", "acc", "ece")} == pytest.approx({k: one[k] for k in ("nll", "acc", "ece")}, 1e-4)
    trained, zero_shot = (scores(folders["two"], name, mc) for mc in ("mean", "zero_shot"))
    assert np.abs(trained - zero_shot).max() > 1e-2, "training changed the predictions"


@pytest.mark.parametrize("name", ["sgp", "sgp_fsdp", "sgp_ensemble"])
def test_each_process_has_its_own_noise_and_the_kl_counts_once(folders, name):
    one, two = (steps(folders[k], name)[0] for k in ("one", "two"))
    assert two["kl"] == pytest.approx(one["kl"], rel=1e-5)  # at the start it does not depend on the draw
    assert two["nll"] != pytest.approx(one["nll"], rel=1e-6)
    assert two["loss"] == pytest.approx(two["nll"] + two["beta"] * two["kl"] / 11, rel=1e-5)
    assert scores(folders["two"], name, "3").shape == (3, 7, 3)
    assert finals(folders["two"], name).keys() == {"zero_shot", "3", "mean"}


def test_sharded_weights_change_nothing(folders):
    assert [s["loss"] for s in steps(folders["two"], "sgp_fsdp")] == pytest.approx(
        [s["loss"] for s in steps(folders["two"], "sgp")], rel=1e-5
    )
    for mc in ("3", "mean"):
        sharded, whole = (scores(folders["two"], name, mc) for name in ("sgp_fsdp", "sgp"))
        np.testing.assert_allclose(sharded, whole, rtol=0, atol=1e-4)


def test_an_interrupt_of_one_process_stops_all_and_one_process_can_go_on(folders):
    said = (folders["two"] / "stdout").read_text()
    assert all(f"rank {rank} stopped after step 3" in said for rank in range(2))
    assert (folders["two"] / "cut" / FOLDER / FILE).exists()
    run = prepare(compose(CONFIGS, command_line(folders["two"], "cut", "resume=true")))
    finish(run, train(run))
    np.testing.assert_allclose(
        scores(folders["two"], "cut", "mean"), scores(folders["one"], "mle", "mean"), rtol=0, atol=1e-4
    )


def test_processes_end_without_an_abort_while_torch_still_holds_their_group(tmp_path):
    script = tmp_path / "end.py"
    script.write_text(END)
    for _ in range(3):  # without the wait of World.close, each of these fails about every second time
        by_two(str(script))


WAIT = """
import torch, torch.distributed as dist
from utils.distributed import LONGEST_WAIT, World

world = World(torch.device("cpu"))
timeout = dist.group.WORLD._get_backend(world.device).options._timeout
assert timeout == LONGEST_WAIT, timeout
world.close()
"""


def test_processes_wait_for_a_download_of_rank_0(tmp_path):
    script = tmp_path / "wait.py"
    script.write_text(WAIT)
    by_two(str(script))


def test_only_rank_0_reads_weights_that_will_be_sharded(overrides):
    cfg = compose(CONFIGS, overrides("train.fsdp=true"))
    for rank in (0, 1):
        model = load(cfg, world(rank, 2))[2]
        assert all(p.is_meta == (rank == 1) for p in model.parameters())
    assert not any(p.is_meta for p in load(compose(CONFIGS, overrides()), world(1, 2))[2].parameters())


def test_sharding_needs_several_processes(tmp_path, overrides):
    with pytest.raises(ValueError, match="needs several processes: start the command with torchrun"):
        prepare(compose(CONFIGS, overrides("train.fsdp=true")))
