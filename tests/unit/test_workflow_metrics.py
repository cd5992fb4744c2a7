"""What a step's sums and counts say to a person."""

from __future__ import annotations

from burnish.workflows.run import means


def test_what_did_not_occur_is_not_said_and_a_loss_over_nothing_is_0() -> None:
    """A step of KTO with two rejected answers and no chosen one: its chosen answers have no reward, not one of 0."""
    metrics = {"rewards/chosen": (0.0, 0.0), "rewards/rejected": (-3.0, 2.0), "loss": (1.5, 2.0)}
    assert means(metrics) == {"rewards/rejected": -1.5, "loss": 0.75}
    assert means({"loss": (0.0, 0.0), "accuracy": (0.0, 0.0)}) == {"loss": 0.0}
