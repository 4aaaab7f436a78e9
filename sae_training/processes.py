"""Several processes that train one set of SAEs together, through accelerate; alone there is nothing to do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# For a partner that neither answers nor closes its connection. gloo notices a dead one by its connection, so that the
# others may wait as long as filling a cache takes; nccl notices by the time alone.
TIMEOUT = {"cpu": timedelta(days=1), "cuda": timedelta(hours=2)}


@dataclass
class Processes:
    """`count` processes, of which this is number `rank`; the default is one alone."""

    count: int = 1
    rank: int = 0

    @classmethod
    def launched(cls, device: torch.device) -> Processes:
        """Those that `accelerate launch` (or torchrun) started with this one: gloo on CPUs, nccl on GPUs."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT.get(device.type, TIMEOUT["cuda"]))
        return cls(state.num_processes, state.process_index)

    @property
    def first(self) -> bool:
        """Does this process write files and say what happens?"""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up each tensor over all processes, in place and in float32."""
        if self.count > 1:
            flat = torch.cat([t.flatten().float() for t in tensors])
            dist.all_reduce(flat)
            for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def gather(self, values: Tensor) -> Tensor:
        """The values [n] of all processes, n differing between them."""
        if self.count == 1:
            return values
        sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.count)]
        dist.all_gather(sizes, torch.tensor([len(values)], device=values.device))
        width = int(max(sizes))
        padded = [values.new_zeros(width) for _ in sizes]
        dist.all_gather(padded, torch.nn.functional.pad(values, (0, width - len(values))))
        return torch.cat([p[: int(n)] for p, n in zip(padded, sizes)])

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()
