"""All faults and all healthy kinds by name; importing this file declares them."""

from __future__ import annotations

from calibration import (
    faults_data,
    faults_loop,
    faults_loss,
    faults_modes,
    faults_network,
    faults_optimization,
    faults_outcome,
    faults_schedule,
    faults_scripts,
    healthy_methods,
    healthy_schedules,
    healthy_scripts,
)
from calibration.fault import FAULTS, Fault
from calibration.healthy import HEALTHY, Healthy

DECLARING = (
    faults_loop, faults_schedule, faults_modes, faults_loss, faults_data, faults_optimization, faults_network,
    faults_outcome, healthy_schedules, healthy_methods, faults_scripts, healthy_scripts,
)  # fmt: skip


def faults() -> dict[str, Fault]:
    """The faults, in the order of their files."""
    return dict(FAULTS)


def healthy_kinds() -> dict[str, Healthy]:
    """The healthy kinds, in the order of their files."""
    return dict(HEALTHY)
