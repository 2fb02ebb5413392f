"""A codec in a few lines: signs with the mean magnitude of a block, one element to a byte."""

from __future__ import annotations

import torch
from torch import Tensor


class SignCodec:
    def __init__(self, block: int = 8) -> None:
        self.block = block

    @property
    def meaning(self) -> str:
        return f"signs in blocks of {self.block}"

    def payload_bytes(self, numel: int) -> int:
        return -(-numel // self.block) * 4 + numel

    def encode(self, x: Tensor, *, error: Tensor | None = None, payload: Tensor | None = None) -> Tensor:
        if payload is None:
            payload = torch.empty(self.payload_bytes(x.numel()), dtype=torch.uint8)
        total = x.float() if error is None else x.float() + error
        scales = torch.tensor([part.abs().mean() for part in total.split(self.block) if part.numel()])
        head = scales.numel() * 4
        payload[:head] = scales.view(torch.uint8)
        payload[head:] = (total >= 0).to(torch.uint8)
        if error is not None:
            error.copy_(total - self.decode(payload, torch.empty_like(total)))
        return payload

    def decode(self, payload: Tensor, out: Tensor) -> Tensor:
        head = -(-out.numel() // self.block) * 4
        scales = payload[:head].clone().view(torch.float32).repeat_interleave(self.block)[: out.numel()]
        return out.copy_((payload[head:].float() * 2 - 1) * scales)

    def accumulate(self, payload: Tensor, out: Tensor, *, scale: float = 1.0) -> Tensor:
        return out.add_(self.decode(payload, torch.empty_like(out)), alpha=scale)
