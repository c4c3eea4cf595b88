"""Log-odds margins of classifications."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-odds margins m_i = z_{i,y} - logsumexp_{k != y} z_{i,k}, (n,), in the logits' dtype and differentiable.

    logits (n, K) floating; labels (n,) class numbers. Positive where the label has more than half of the
    probability.
    """
    own = F.one_hot(labels.long(), logits.shape[-1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).logsumexp(-1)
