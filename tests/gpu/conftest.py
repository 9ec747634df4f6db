import gc

import pytest


@pytest.fixture(autouse=True)
def _memory_of_earlier_tests_is_free():
    """What a test has left in cycles would be freed at some time in the next one, which counts."""
    gc.collect()
