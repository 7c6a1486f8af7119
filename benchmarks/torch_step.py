"""The opponent: one training step in PyTorch, with the work of the authors' code.

A plain DINOv2-style ViT (LayerScale, exact GELU, scaled_dot_product_attention), AdamW over student
and heads, and the masked pass over the whole batch, of which half is used.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from proteus_jax.models.config import ViTSpec


class _Block(nn.Module):
    def __init__(self, spec: ViTSpec):
        super().__init__()
        self.heads, width = spec.heads, spec.width
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.swiglu = spec.feed_forward == "swiglu"
        self.fc1 = nn.Linear(width, spec.hidden * (2 if self.swiglu else 1))
        self.fc2 = nn.Linear(spec.hidden, width)
        self.gamma1 = nn.Parameter(torch.ones(width))
        self.gamma2 = nn.Parameter(torch.ones(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, width = tokens.shape
        qkv = self.qkv(self.norm1(tokens)).reshape(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        tokens = tokens + self.gamma1 * self.proj(mixed)
        hidden = self.fc1(self.norm2(tokens))
        if self.swiglu:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = functional.silu(gate) * value
        else:
            hidden = functional.gelu(hidden)
        return tokens + self.gamma2 * self.fc2(hidden)


class _ViT(nn.Module):
    def __init__(self, spec: ViTSpec, image: int):
        super().__init__()
        patch = spec.patch_size
        self.patches = nn.Conv2d(3, spec.width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.mask_token = nn.Parameter(torch.zeros(1, spec.width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image // patch) ** 2, spec.width))
        self.blocks = nn.Sequential(*(_Block(spec) for _ in range(spec.depth)))
        self.norm = nn.LayerNorm(spec.width, 1e-6)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)
        cls = self.cls_token.expand(len(tokens), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, tokens], dim=1) + self.positions))


class TorchStep(NamedTuple):
    """A whole training step, and the teacher's forward pass alone; each ends when the device does.

    `images` is their batch.
    """

    train: Callable[[], float]
    teach: Callable[[], None]


def make(
    teacher: ViTSpec,
    student: ViTSpec,
    *,
    batch: int,
    image: int,
    device: str = "cpu",
    compiled: bool = False,
) -> TorchStep:
    """Float32 on a CPU, bfloat16 autocast elsewhere, where the authors have float16."""
    torch.manual_seed(0)
    frozen = _ViT(teacher, image).to(device).eval().requires_grad_(False)
    backbone = _ViT(student, image).to(device)
    widths = student.width, teacher.width
    heads = nn.ModuleList(
        nn.Sequential(nn.LayerNorm(widths[0]), nn.Linear(*widths)) for _ in range(3)
    ).to(device)
    parameters = [*backbone.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    pixels = torch.randn(batch, 3, image, image, device=device)
    patches = (image // teacher.patch_size) ** 2
    mask = torch.zeros(batch, patches, dtype=torch.bool, device=device)
    for row in range(batch // 2):
        mask[row, torch.randperm(patches)[: patches // 2]] = True
    if compiled:
        frozen, backbone = torch.compile(frozen), torch.compile(backbone)
    squared_error = functional.mse_loss

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16, enabled=device != "cpu")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def train() -> float:
        with torch.no_grad(), autocast():
            target = frozen(pixels)
        with autocast():
            masked, plain = backbone(pixels, mask), backbone(pixels)
            token, feature = heads[0](plain[:, :1]), heads[1](plain[:, 1:])
            patch = heads[2](masked[:, 1:][mask])
        target = target.float()
        loss = squared_error(token.float(), target[:, :1])
        loss = loss + squared_error(torch.cat([token, feature], dim=1).float(), target)
        loss = loss + squared_error(patch.float(), target[:, 1:][mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    def teach() -> None:
        with torch.no_grad(), autocast():
            frozen(pixels)
        wait()

    return TorchStep(train, teach)
