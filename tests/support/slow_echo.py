"""An echo worker on a GPU that reads late: its copies wait on the device, behind a long kernel, and
its loader returns at once. What it has in the end is what lay in the slots when they were read."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from qerl_sync.bench.echo import EchoLoader, checksum, main
from qerl_sync.buffers.trace import Trace
from qerl_sync.plan.sync_plan import Chunk

NAME = __name__
CYCLES = 20_000_000  # about ten milliseconds


class SlowLoader(EchoLoader):
    def receive(self, chunk: Chunk, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        torch.cuda._sleep(CYCLES)
        for name, tensor in tensors:
            self._kept[name] = tensor.to("cuda", non_blocking=True, copy=True)

    def start(self, *arguments, **options) -> None:
        super().start(*arguments, **options)
        self._kept: dict[str, torch.Tensor] = {}

    def finish(self) -> Trace:
        self.checksums = {name: checksum(tensor) for name, tensor in self._kept.items()}
        return super().finish()


if __name__ == "__main__":
    main(SlowLoader(), torch.device(sys.argv[1]))
