"""One sync on several trainer ranks: they gather together, and succeed or fail together."""

from qerl_sync.transports.joint.ranks import TrainerRanks
from qerl_sync.transports.joint.transport import JointTransport, LedTransport

__all__ = ["JointTransport", "LedTransport", "TrainerRanks"]
