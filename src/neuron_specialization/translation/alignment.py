"""A loss that aligns the encoder's states of a sentence with those of its translation, token by token."""

import torch
from torch.nn import functional as F

_TEMPERATURE = 0.05


def alignment_loss(
    source: torch.Tensor, source_mask: torch.Tensor, target: torch.Tensor, target_mask: torch.Tensor
) -> torch.Tensor:
    """Return the token-alignment loss of a batch of sentence pairs, a mean over both directions.

    With h_i and g_j the states of a sentence x and of a translation y,
    s(x, y) = ½ [mean_i max_j cos(h_i, g_j) + mean_j max_i cos(h_i, g_j)]: each token is aligned with the most similar
    one of the other sentence. The loss is contrastive, because equal states everywhere would satisfy similarity alone:
    -log softmax_c(s(x_b, y_c) / 0.05)_b, and likewise for y_b among all x_c, over the sentences of the batch.

    Args:
        source: encoder states [batch, source length, d].
        source_mask: 1 where there is a token [batch, source length].
        target: encoder states of the translations [batch, target length, d].
        target_mask: likewise.
    """
    source, target = (F.normalize(states.float(), dim=-1) for states in (source, target))
    source_mask, target_mask = source_mask.bool(), target_mask.bool()
    cosines = torch.einsum("bid,cjd->bcij", source, target)
    nowhere = torch.finfo(cosines.dtype).min
    to_target = cosines.masked_fill(~target_mask[None, :, None, :], nowhere).amax(3)  # [batch, batch, source length]
    to_source = cosines.masked_fill(~source_mask[:, None, :, None], nowhere).amax(2)
    forth = (to_target * source_mask[:, None]).sum(2) / source_mask.sum(1)[:, None]
    back = (to_source * target_mask[None]).sum(2) / target_mask.sum(1)[None]
    similarity = (forth + back) / (2 * _TEMPERATURE)
    same = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
