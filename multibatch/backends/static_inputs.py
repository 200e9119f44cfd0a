"""Inputs at addresses that stay, as a captured graph needs them."""

from __future__ import annotations

import torch

from multibatch.batch import ProgramInputs

ALIGNMENT_BYTES = 16
"""Of every input: Triton and Inductor compile kernels for such addresses, and others for the rest."""


class StaticInputs:
    """The memory that a graph reads its inputs from; one copy per dtype fills it."""

    def __init__(self, example: ProgramInputs, device: torch.device) -> None:
        """Holds the values of `example` first, which is on the host."""
        self._host, self._staged = _buffers(example, torch.device("cpu"))
        self._device, self.inputs = _buffers(example, device)
        self.fill(example)

    def fill(self, inputs: ProgramInputs) -> None:
        """Takes the values of inputs of the same shapes, which are on the host."""
        for staged, tensor in zip(self._staged.tensors(), inputs.tensors(), strict=True):
            assert staged.shape == tensor.shape
            staged.copy_(tensor)
        for host, device in zip(self._host, self._device, strict=True):
            device.copy_(staged_for(host, device.device), non_blocking=True)


def staged_for(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a copy to the device may read later: on a GPU a pinned copy, which PyTorch keeps until it was read.

    Any other copy waits until the GPU has done all that was queued before.
    """
    return host.pin_memory() if device.type == "cuda" else host


def _buffers(example: ProgramInputs, device: torch.device) -> tuple[list[torch.Tensor], ProgramInputs]:
    """A vector per dtype, and views of it with the shapes of `example`, each where compiled kernels expect an input."""
    ends: dict[torch.dtype, int] = {}
    starts = []
    for tensor in example.tensors():
        step = ALIGNMENT_BYTES // tensor.element_size()
        starts.append(-(-ends.get(tensor.dtype, 0) // step) * step)
        ends[tensor.dtype] = starts[-1] + tensor.numel()
    flat = {kind: torch.zeros(end, dtype=kind, device=device) for kind, end in ends.items()}
    views = [
        flat[tensor.dtype][start : start + tensor.numel()].view(tensor.shape)
        for start, tensor in zip(starts, example.tensors(), strict=True)
    ]
    return list(flat.values()), ProgramInputs(*views)
