"""Which quantities share the pass that gives the logits, where all of them will be asked for."""

from __future__ import annotations

from collections.abc import Collection

from diag.snapshot.activations import ActivationListener
from diag.snapshot.inside.attention import AttentionListener
from diag.snapshot.inside.listener import PassListener
from diag.snapshot.inside.normalization import StatisticsListener
from diag.snapshot.snapshot import Snapshot

# Attention first, outside of the others: it computes scores again, which are none of the model's calls.
LISTENERS: dict[str, type[PassListener]] = {
    "attention_calls": AttentionListener,
    "activations": ActivationListener,
    "running_statistics": StatisticsListener,
}


def share_the_pass(snapshot: Snapshot, quantities: Collection[str]) -> None:
    """These quantities will be asked for: those that listen to a pass share one."""
    snapshot.listeners = {name: kind(snapshot.model) for name, kind in LISTENERS.items() if name in quantities}
