"""The table of architectures, and one of its rows."""

from __future__ import annotations

import pytest

from conformance import receivers
from conformance.__main__ import DATA, page, receiver_rows, run_receiver, run_row


def test_the_page_is_that_of_the_results():
    assert (DATA / "README.md").read_text() == page()


def test_the_page_of_receivers_is_that_of_the_results():
    found = receiver_rows()
    assert (DATA.parent / "quantisation.md").read_text() == receivers.page(found)
    for rows in found.values():
        assert rows.keys() == set(receivers.ROWS)
        assert "wrong" not in {row[side] for row in rows.values() for side in ("full", "adapter")}


@pytest.mark.vllm
@pytest.mark.slow
def test_a_checkpoint_that_is_quantised_takes_an_adapter_and_norms_alone():
    row = run_receiver("GPTQ int4")
    assert (row["full"], row["adapter"]) == ("refused", "exact"), row
    assert row["quantisation"]["bits"]["4"] == 8, row
    assert row["quantisation"]["from_checkpoint"]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "kernels"),
    [
        ("BloomForCausalLM", "stock"),  # a CPU kernel has packed a tied head, which vLLM forgets
        ("Qwen2ForCausalLM", "bf16"),  # and has cast biases, which vLLM no longer rounds
    ],
)
def test_a_row_tells_right_from_wrong(architecture, kernels):
    row = run_row(architecture, kernels)
    assert (row["ours"], row["predictions"]) == ("exact", [5, 5]), row
    assert row["stock"] == "wrong", row
