"""Loading a checkpoint without running any code from it.

    checkpoint = load_state("epoch3.pt")  # or .safetensors, .bin, .ckpt, a folder (Hugging Face, DCP, all ranks)
    load_into(model, checkpoint)          # refuses what does not fit, and names the first difference

`formats` reads each kind of file, `distributed` the folders of torch.distributed.checkpoint, `rank_files` those of
what every rank saved, `contents` finds the state dict and the step in what was read, and `fit` matches it with a
model.
"""

from diag.checkpoints.contents import Checkpoint, SavedFile, as_checkpoint, load_saved, load_state
from diag.checkpoints.fit import load_into

__all__ = ["Checkpoint", "SavedFile", "as_checkpoint", "load_into", "load_saved", "load_state", "unwrap"]
