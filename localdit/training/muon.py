"""Muon: the optimizer of the matrices in a model's blocks, beside AdamW for everything else.

It needs PyTorch 2.9, the first with `torch.optim.Muon`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# Linear layers whose weight holds several matrices, one above the other, and how many.
PACKED = {"to_qkv": 3, "to_global_kv": 2}


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the weights of linear layers within blocks, AdamW for all other parameters.

    Muon (Jordan et al., 2024) moves a matrix by the orthogonalised average of its gradients, which
    five Newton-Schulz iterations approximate. The update is scaled by `0.2 sqrt(max(rows,
    columns))`, so that its root mean square is about that of AdamW's (Liu et al., 2025, "Muon is
    scalable for LLM training", section 2.2). So both share the learning rate and the weight decay.

    Queries, keys and values are separate matrices, though one layer may hold them. Embeddings, the
    modulation and the output layer lie outside the blocks. They, and convolutions, biases, norms
    and tables inside the blocks, are AdamW's.

    Args:
        parameters: names and parameters of a model.
        learning_rate: the rate of the first step.
        weight_decay: share of a weight, times the learning rate, that each step subtracts.
        betas: decay of the first and the second moment of AdamW. Muon's momentum is 0.95.
        fused: whether AdamW is computed by PyTorch's fused kernel.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.nn.Parameter]],
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        fused: bool = False,
    ) -> None:
        groups: dict[int, list[torch.nn.Parameter]] = {}
        for name, parameter in parameters:
            groups.setdefault(matrices_in(name, parameter), []).append(parameter)
        others = groups.pop(0, [])
        self.muon = _PackedMuon(
            [{"params": group, "matrices": number} for number, group in sorted(groups.items())],
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            others, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=fused
        )
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with both optimizers, which work on the groups and the state of this one."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        matrices = [group for group in self.param_groups if "matrices" in group]
        others = [group for group in self.param_groups if "matrices" not in group]
        for optimizer, groups in ((self.muon, matrices), (self.adamw, others)):
            optimizer.param_groups, optimizer.state = groups, self.state
            optimizer.step()
        return loss


def matrices_in(name: str, parameter: torch.Tensor) -> int:
    """Return the number of matrices in a parameter that Muon moves, 0 for a parameter of AdamW."""
    path = name.split(".")
    if "transformer_blocks" in path and path[-1] == "weight" and parameter.dim() == 2:
        return PACKED.get(path[-2], 1)
    return 0


class _PackedMuon(torch.optim.Muon):
    """PyTorch's Muon, for parameters of several matrices: `matrices` of their group."""

    def _init_group(
        self,
        group: Any,
        params_with_grad: list[torch.Tensor],
        grads: list[torch.Tensor],
        muon_momentum_bufs: list[torch.Tensor],
    ) -> bool:
        """Add the tensors of a group to the lists, each cut into its matrices. They are views."""
        is_complex = super()._init_group(group, params_with_grad, grads, muon_momentum_bufs)
        for tensors in (params_with_grad, grads, muon_momentum_bufs):
            tensors[:] = [part for whole in tensors for part in whole.chunk(group["matrices"])]
        return is_complex
