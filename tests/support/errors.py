"""Errors by class and attributes: their texts may be improved without a test failing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def raises(kind: type[Exception], **facts: Any) -> Iterator[pytest.ExceptionInfo[Any]]:
    """Expect an error of that class, with attributes that are equal to these."""
    with pytest.raises(kind) as caught:
        yield caught
    found = {name: getattr(caught.value, name, "no such attribute") for name in facts}
    assert found == facts, str(caught.value)
