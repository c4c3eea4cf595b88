"""What the processes of one training have in common: who they are, how tensors are spread over them, and messages.

Rule of the room: nothing here waits without a limit, and a failure is a reason in words, never an exception. It
uses torch.distributed and knows no model, no watch and no file.
"""

__all__ = ["checksums", "link", "lockstep", "meeting", "placement", "together"]
