"""The table of architectures, and one of its rows."""

from __future__ import annotations

import pytest

from conformance.__main__ import DATA, page, run_row


def test_the_page_is_that_of_the_results():
    assert (DATA / "README.md").read_text() == page()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_row_tells_right_from_wrong():
    """vLLM's own reload forgets tied heads that a CPU kernel has packed."""
    row = run_row("BloomForCausalLM", "stock")
    assert (row["ours"], row["predictions"]) == ("exact", [5, 5]), row
    assert row["stock"] == "wrong", row
