"""What a training loop does, collected for the checks on it (see `diag.snapshot.loop`).

Rule of the folder: what runs at every step looks at a bounded number of things, whatever the size of the model; all
parameters are swept at steps 1, 2, 3, 10, 30, 100, ... only. Nothing waits for a device. Nothing is judged here.
"""

__all__ = ["moment", "observer"]
