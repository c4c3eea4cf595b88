"""What ranks need, imported once by the server that they are forked from (see `starting`)."""

import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # noqa: F401

from diag.registry import instruments

instruments()  # imports what diag loads at first use
