"""What LoRA's A and B start as (`lora.start`), from one weight matrix; and the layers that they go into.

peft has all of these starts. They are written out here because peft's OLoRA takes no Conv1D, its LoftQ needs CUDA and
leaves the scaling out, its EVA stops short of the directions by a threshold, and none of them subtracts from the base
what the adapter holds after rounding to its own dtype.

Shape suffixes: O out features, I in features, R rank, K the smaller of O and I.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from pipeline.quantized_layers import dequantize_weight

NAME = "default"  # peft's for the adapter that trains
DAMPING = 0.01  # of CorDA: what is added to the diagonal, over its mean
Factors = tuple[torch.Tensor, torch.Tensor]  # A_RI, B_OR
Layers = Mapping[str, Any]


def pissa(w_OI: torch.Tensor, rank: int, scaling: float) -> Factors:
    """The weight's largest singular values, their roots on both sides: s B A = U_r S_r V_r^T (arXiv 2404.02948)."""
    U_OR, S_R, Vh_RI = _largest(w_OI, rank)
    return _factors(U_OR, S_R / scaling, Vh_RI)


def olora(w_OI: torch.Tensor, rank: int, scaling: float) -> Factors:
    """The first columns of Q, first rows of R of the weight's QR factors (arXiv 2406.01775); the scaling comes on top.

    So the base loses s Q_r R_r, as in peft.
    """
    Q_OK, R_KI = torch.linalg.qr(w_OI)
    return R_KI[:rank], Q_OK[:, :rank]


def corda(w_OI: torch.Tensor, moment_II: torch.Tensor, rank: int, scaling: float) -> Factors:
    """The largest singular values of W C, back among weights: s B A = U_r S_r V_r^T C^-1 (arXiv 2406.05223).

    With inputs of the training's own rows that is the paper's instruction-previewed mode: what matters most to the task
    trains. (Its knowledge-preserved mode trains what matters least to rows of another kind.)

    Args:
        moment_II: C = X X^T over the layer's inputs X, or any multiple; damped here, as the authors do, to be inverted.
    """
    w_OI, moment_II = w_OI.double(), moment_II.double()  # a few large inputs, as models have, make C's spectrum wide
    C_II = moment_II + DAMPING * moment_II.diagonal().mean() * torch.eye(len(moment_II)).to(moment_II)
    U_OR, S_R, Vh_RI = _largest(w_OI @ C_II, rank)
    return _factors(U_OR, S_R / scaling, torch.linalg.solve(C_II, Vh_RI.T).T)


def loftq(lost_OI: torch.Tensor, rank: int, scaling: float) -> Factors:
    """The best that rank r can do about W - Q: its largest singular values (arXiv 2310.08659, one iteration)."""
    return pissa(lost_OI, rank, scaling)


def eva(covariance_II: torch.Tensor, rank: int) -> torch.Tensor:
    """A_RI: the orthonormal directions in which the inputs vary most, the first one first (arXiv 2410.07170).

    Args:
        covariance_II: of the inputs, their mean taken off, or any multiple.
    """
    _, vectors_IK = torch.linalg.eigh(covariance_II)  # by ascending variance
    return vectors_IK[:, -rank:].flip(1).T


def _largest(m_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U_OR, S_R and Vh_RI of the largest singular values; those that are rounding (as in `matrix_rank`) are 0."""
    U_OK, S_K, Vh_KI = torch.linalg.svd(m_OI, full_matrices=False)
    rounding = max(m_OI.shape) * torch.finfo(S_K.dtype).eps * S_K[0]
    return U_OK[:, :rank], S_K.masked_fill(rounding >= S_K, 0.0)[:rank], Vh_KI[:rank]


def _factors(U_OR: torch.Tensor, S_R: torch.Tensor, Vh_RI: torch.Tensor) -> Factors:
    roots_R = S_R.sqrt()
    return roots_R[:, None] * Vh_RI, U_OR * roots_R


def lora_layers(model: torch.nn.Module) -> Layers:
    """peft's LoRA layers by their names in the model."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and NAME in m.lora_A}


def size(layer: Any) -> tuple[int, float]:
    """Rank and scaling."""
    return layer.r[NAME], layer.scaling[NAME]


def weight_OI(layer: Any) -> torch.Tensor:
    """The weight under the adapter, float32; a 4-bit one as the layer computes with it."""
    base = layer.get_base_layer()
    state = getattr(base.weight, "quant_state", None)
    if state is not None:
        return dequantize_weight(base, state.dtype).float()
    return (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().float()


def update_OI(layer: Any) -> torch.Tensor:
    """s B A, float32."""
    return product_OI(layer, *factors_of(layer))


def product_OI(layer: Any, A_RI: torch.Tensor, B_OR: torch.Tensor) -> torch.Tensor:
    """s B A of these factors, float32, on their device."""
    product: torch.Tensor = layer.scaling[NAME] * (B_OR.float() @ A_RI.float())
    return product


def factors_of(layer: Any) -> Factors:
    return layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()


def set_factors(layer: Any, A_RI: torch.Tensor, B_OR: torch.Tensor) -> None:
    """In place, in the adapter's own dtype.

    Of a rank that is 0 in A and in B, A stays as it is, random: both at 0 would never get a gradient.
    """
    is_dead_R = ~(A_RI.any(dim=1) | B_OR.any(dim=0))
    layer.lora_A[NAME].weight.data.copy_(torch.where(is_dead_R[:, None], factors_of(layer)[0].to(A_RI), A_RI))
    layer.lora_B[NAME].weight.data.copy_(B_OR)


@torch.no_grad()
def move_into_adapter(layer: Any, A_RI: torch.Tensor, B_OR: torch.Tensor) -> None:
    """Sets the factors and takes from the base what they hold: W - s B A, in the weight's dtype."""
    before_OI = weight_OI(layer)
    set_factors(layer, A_RI, B_OR)
    set_weight(layer, before_OI - update_OI(layer))


@torch.no_grad()
def set_weight(layer: Any, w_OI: torch.Tensor) -> None:
    """The weight under the adapter, in place, in its own dtype."""
    base = layer.get_base_layer()
    base.weight.data.copy_(w_OI.T if isinstance(base, Conv1D) else w_OI)
