"""Every error that qerl-sync raises on purpose.

    SyncError
    ├── ConfigError         a YAML file, an option or an argument is wrong
    ├── CompatError         the installed vLLM or TRL lacks something that a sync needs
    ├── LayerMapError       vLLM refused, ignored or lost a checkpoint tensor in the dry run
    ├── PlanError           no plan satisfies what was asked (policy, budget, doubled names)
    ├── CoverageError       the stream and the plan differ: missing, doubled, misshapen, non-finite
    ├── LoadError           vLLM's own loader failed in the middle of a sync
    └── PoisonedError       the worker holds half of a sync and refuses to generate

Each message names the thing, the value and the next step. Errors of vLLM, TRL and torch are
translated once, where they enter, with ``from exc``.
"""


class SyncError(Exception):
    """Base of all errors that qerl-sync raises on purpose."""


class ConfigError(SyncError):
    """A configuration file, an option or an argument cannot be right."""


class CompatError(SyncError):
    """The installed vLLM or TRL lacks something that a sync needs."""


class LayerMapError(SyncError):
    """vLLM refused, ignored or lost a checkpoint tensor while the layer map was observed."""


class PlanError(SyncError):
    """No plan satisfies what was asked for."""


class CoverageError(SyncError):
    """What arrived is not what the plan promised."""


class LoadError(SyncError):
    """vLLM's own loader failed in the middle of a sync."""


class PoisonedError(SyncError):
    """The worker holds half of a sync and refuses to generate until a full one has succeeded."""
