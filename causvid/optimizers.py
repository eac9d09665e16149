"""Optimizers, each a function from a model to a list of torch optimizers that a player steps together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from causvid.registry import register

# Odd quintic whose iterates take every singular value in (0, 1] near 1 (Jordan et al., "Muon", 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, iterations: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values of ``matrix`` (``m n``) go to about [.5, 1.5].

    Newton-Schulz iterations in bf16 on an accelerator and in fp32 on a CPU, where a bf16 product is up to fifty times
    slower: that is why this is not ``torch.optim.Muon``, which always takes bf16.
    """
    a, b, c = QUINTIC
    x = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(iterations):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if x.shape[0] <= x.shape[1] else wide.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Jordan et al., 2024), for matrices.

    Args:
        parameters: matrices, ``m n`` each.
        lr: learning rate; the update's scale is sqrt(max(1, m / n)).
        momentum: of the Nesterov average of gradients.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                average = state.setdefault("momentum", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(average, group["momentum"]))
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)
        return loss


@register("optimizer", "adamw")
def adamw(
    model: nn.Module, lr: float = 1e-3, betas: Sequence[float] = (0.9, 0.999), weight_decay: float = 0.0
) -> list[torch.optim.Optimizer]:
    """AdamW on everything."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [torch.optim.AdamW(parameters, lr=lr, betas=(betas[0], betas[1]), weight_decay=weight_decay)]


@register("optimizer", "muon")
def muon(
    model: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.95,
    rest_lr: float = 2e-3,
    rest_betas: Sequence[float] = (0.9, 0.99),
) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the transformer's blocks, AdamW on the rest (embeddings, head, norms, modulation).

    A network without such blocks, as a discriminator, is all rest.
    """
    blocks = getattr(model, "blocks", None)
    matrices = [m.weight for m in blocks.modules() if isinstance(m, nn.Linear)] if blocks is not None else []
    ours = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ours]
    last = torch.optim.AdamW(rest, lr=rest_lr, betas=(rest_betas[0], rest_betas[1]), weight_decay=0.0)
    return [Muon(matrices, lr=lr, momentum=momentum), last] if matrices else [last]
