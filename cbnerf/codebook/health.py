"""Codebook health: how many codes are used, how evenly, and how often render and photograph agree.

*Counts* are the numbers of uses of each code, `[codes]`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def count_codes(indices: Int[Tensor, "*batch"], num_codes: int) -> Int[Tensor, " codes"]:
    indices = indices.flatten()
    # `bincount` would synchronise with the GPU.
    return indices.new_zeros(num_codes).index_add_(0, indices, torch.ones_like(indices))


def perplexity(counts: Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """exp(entropy) of the usage: k codes used equally often give k; counts 2, 1, 1 give 2.83."""
    return torch.special.entr(counts / counts.sum()).sum().exp()


def used_share(counts: Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """Fraction of codes that are used at all."""
    return (counts > 0).float().mean()


class CodebookHealth:
    """Accumulates the code usage of many batches; one batch is too small for a large codebook."""

    def __init__(self, num_codes: int):
        self.high_res_counts = torch.zeros(num_codes, dtype=torch.int64)
        self.sr_counts = torch.zeros_like(self.high_res_counts)
        self._agreed = self.sr_counts.new_zeros(())

    def add(
        self,
        high_res_indices: Int[Tensor, "*batch rows columns"],
        sr_indices: Int[Tensor, "*batch sr_rows sr_columns"],
    ) -> None:
        """Add codes of photographs and of renders, the latter at every n-th row and column."""
        device, num_codes = sr_indices.device, len(self.sr_counts)
        step = high_res_indices.shape[-1] // sr_indices.shape[-1]
        agreed = (high_res_indices[..., ::step, ::step] == sr_indices).sum()
        # The first batch moves the sums to its device.
        self.high_res_counts = self.high_res_counts.to(device).add_(
            count_codes(high_res_indices, num_codes)
        )
        self.sr_counts = self.sr_counts.to(device).add_(count_codes(sr_indices, num_codes))
        self._agreed = self._agreed.to(device).add_(agreed)

    def clear(self) -> None:
        for sums in (self.high_res_counts, self.sr_counts, self._agreed):
            sums.zero_()

    def metrics(self) -> dict[str, float]:
        """`codebook/perplexity` and `codebook/used` (fraction of codes) of the photographs, and
        `codebook/agreement`, the fraction of places where render and photograph have one code;
        empty without batches."""
        if not self.sr_counts.any():
            return {}
        return {
            "codebook/perplexity": float(perplexity(self.high_res_counts)),
            "codebook/used": float(used_share(self.high_res_counts)),
            "codebook/agreement": float(self._agreed / self.sr_counts.sum()),
        }
