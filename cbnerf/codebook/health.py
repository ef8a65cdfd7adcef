"""Codebook health: how many codes are used, how evenly, and do renders find those of photographs.

*Counts* are the uses of each code, `[codes]`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def count_codes(indices: Int[Tensor, "*batch"], num_codes: int) -> Int[Tensor, " codes"]:
    indices = indices.flatten()
    # Not bincount, which waits for the GPU.
    return indices.new_zeros(num_codes).index_add_(0, indices, torch.ones_like(indices))


def perplexity(counts: Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """exp(entropy) of how often each code is used: the number of codes if all are used alike."""
    return torch.special.entr(counts / counts.sum()).sum().exp()


def used_share(counts: Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """Share of the codes that occur at all."""
    return (counts > 0).float().mean()


class CodebookHealth:
    """Sums up what many batches did with the codes; one batch cannot use a large codebook."""

    def __init__(self, num_codes: int, device: torch.device):
        self.high_res_counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.sr_counts = torch.zeros_like(self.high_res_counts)
        self._agreed = self.sr_counts.new_zeros(())

    def add(
        self,
        high_res_indices: Int[Tensor, "*batch rows columns"],
        sr_indices: Int[Tensor, "*batch sr_rows sr_columns"],
    ) -> None:
        """Codes of photographs, and of renders at all places or at every n-th row and column."""
        num_codes = len(self.sr_counts)
        step = high_res_indices.shape[-1] // sr_indices.shape[-1]
        self.high_res_counts += count_codes(high_res_indices, num_codes)
        self.sr_counts += count_codes(sr_indices, num_codes)
        self._agreed += (high_res_indices[..., ::step, ::step] == sr_indices).sum()

    def clear(self) -> None:
        for sums in (self.high_res_counts, self.sr_counts, self._agreed):
            sums.zero_()

    def metrics(self) -> dict[str, float]:
        """`codebook/perplexity` and `codebook/used` (share of codes) of the photographs, and
        `codebook/agreement`, the share of places where the render finds the photograph's code."""
        return {
            "codebook/perplexity": float(perplexity(self.high_res_counts)),
            "codebook/used": float(used_share(self.high_res_counts)),
            "codebook/agreement": float(self._agreed / self.sr_counts.sum()),
        }
