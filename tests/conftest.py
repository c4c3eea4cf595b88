"""One thread a process: results then do not depend on the number of cores, and parallel workers do not fight."""

import torch

torch.set_num_threads(1)
