"""Several processes with one run: whose share of a batch is whose, how results come together, sharded weights.

Processes are started by torchrun or ``accelerate launch``. The batches of optimiser steps and evaluations are the same
whatever the number of processes; each takes its share of their rows, so that all make equally many forward passes
(which collectives inside the model need). Parameters that are trained are whole in every process.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from utils.llm.layers import decoder_layers

LONGEST_WAIT = timedelta(hours=24)
"""Of one process for others: while rank 0 fetches and reads a model, the rest wait (torch's own: 10 or 30 minutes)."""
T = TypeVar("T")


def started_several() -> bool:
    """Whether this process is one of several that torchrun or ``accelerate launch`` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class World:
    """The processes that share a run. ``rank`` 0 writes.

    Args:
        device: ``cpu`` for processes on CPUs, else each takes the GPU of its local rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = 0, 1, device
        if started_several():
            state = PartialState(cpu=device.type == "cpu", timeout=LONGEST_WAIT)
            self.rank, self.size, self.device = state.process_index, state.num_processes, state.device
        if self.device.type == "cuda":  # CUDA graphs are recorded on the current device
            torch.cuda.set_device(self.device)

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def rows(self, n: int) -> list[int]:
        """This process's rows of n, equally many for all; where they do not divide, the last row is repeated."""
        each = -(-n // self.size)
        return [min(i, n - 1) for i in range(self.rank * each, (self.rank + 1) * each)]

    def micro_batches(self, examples: Sequence[T], batch_size: int) -> Iterator[tuple[list[T], float]]:
        """This process's forward passes of a step over ``examples``: examples and their weight in the step's mean.

        Weights sum to 1 over all processes. Every process gets equally many; one that has no examples left gets the
        first example with weight 0.
        """
        each = -(-len(examples) // self.size)
        own = examples[self.rank * each : (self.rank + 1) * each]
        for start in range(0, each, batch_size):
            micro = list(own[start : start + batch_size])
            yield micro or list(examples[:1]), len(micro) / len(examples)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace every tensor by its sum over all processes, in one message per type."""
        if self.size == 1:
            return
        groups: dict[torch.dtype, list[Tensor]] = {}
        for t in tensors:
            groups.setdefault(t.dtype, []).append(t)
        for group in groups.values():
            flat = torch.cat([t.reshape(-1) for t in group])
            dist.all_reduce(flat)
            for t, part in zip(group, flat.split([t.numel() for t in group]), strict=True):
                t.copy_(part.view_as(t))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        count = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(count)
        return bool(count)

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let rank 0 go through the body before the others (it fills caches that they read)."""
        if self.size > 1 and not self.main:
            dist.barrier()
        yield
        if self.size > 1 and self.main:
            dist.barrier()

    def close(self) -> None:
        """Leave the group of processes.

        Caches of torch's can hold the group longer (those of sharded weights do). The threads of its collectives then
        live on, and need the interpreter to let go of their last tensors: one that ends before they had it aborts the
        process. The wait gives it to them.
        """
        if self.size > 1:
            dist.destroy_process_group()
            time.sleep(0.1)


def shard_frozen(model: nn.Module, world: World) -> None:
    """Spread the frozen weights over the GPUs of all processes (FSDP2), one decoder layer gathered at a time.

    Only rank 0 needs the weights: where others have the structure alone (meta tensors), they receive them layer by
    layer. What is trained stays whole in every process, as rank 0 has it, and is moved to its device.

    Raises:
        ValueError: for a single process, or quantised weights, which cannot be sharded.
    """
    from torch.distributed.fsdp import fully_shard

    if world.size == 1:
        raise ValueError("train.fsdp=true needs several processes: start the command with torchrun --nproc-per-node=N")
    if any(not p.is_floating_point() for p in model.parameters()):
        raise ValueError("train.fsdp=true cannot shard quantised weights: set quantization=none")
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    sharded: set[nn.Module] = set()
    # saving in one process releases what it gathered: between forward passes nothing may be left gathered in the others
    for module in [*decoder_layers(model), model]:
        own = [m for m in module.modules() if m not in sharded]
        receive(own, world)
        trained = {p for p in module.parameters() if p.requires_grad}
        fully_shard(module, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
        for p in trained:
            p.data = p.data.to(world.device)
        sharded.update(own)


def receive(modules: Iterable[nn.Module], world: World) -> None:
    """Give all processes rank 0's parameters and buffers of these modules (their own, not those of modules inside).

    Tensors that a process has are overwritten; meta tensors are replaced, a tied one in all its places.

    Raises:
        RuntimeError: if the modules of a process have other tensors than those of rank 0.
    """
    places: dict[int, tuple[Tensor, list[tuple[dict[str, Any], str]]]] = {}
    for module in modules:
        tables: tuple[dict[str, Any], dict[str, Any]] = (module._parameters, module._buffers)
        for table in tables:
            for name in (name for name, t in table.items() if t is not None):
                places.setdefault(id(table[name]), (table[name], []))[1].append((table, name))
    own = [([name for _, name in where], tuple(t.shape)) for t, where in places.values()]
    told = world.gather((own, [t.dtype for t, _ in places.values()]))[0]
    if told[0] != own:
        raise RuntimeError(f"rank {world.rank} has other parameters than rank 0: give all the same command")
    for (t, where), dtype in zip(places.values(), told[1], strict=True):
        sent = t.detach().to(world.device) if world.main else torch.empty(t.shape, dtype=dtype, device=world.device)
        dist.broadcast(sent, src=0)
        if t.is_meta:
            filled = nn.Parameter(sent, t.requires_grad) if isinstance(t, nn.Parameter) else sent
            for table, name in where:
                table[name] = filled
        elif not world.main:
            t.detach().copy_(sent)
