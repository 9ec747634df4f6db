"""The tiny models that the product breaks itself with serve its tests too."""

from __future__ import annotations

from qerl_sync.faults.models import CONFIGS, make_model, save_model

__all__ = ["CONFIGS", "make_model", "save_model"]
