"""Workers in other processes: one connection each, one plan for all of them."""

from qerl_sync.transports.remote.transport import RemoteTransport

__all__ = ["RemoteTransport"]
