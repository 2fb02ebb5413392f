"""Settings that contradict each other, or cannot be, are refused."""

from __future__ import annotations

from typing import Any

import pytest
from ds_pipe import make_schedule
from ds_pipe.config import PipeConfig


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"replan": 2}, "replan must be at least 3 steps, of which one warms up; got 2"),
        ({"schedule": "forward_only"}, "'forward_only' has no backward passes: name one to train by"),
        ({"schedule": "gpipe", "plan": "a"}, "schedule = 'gpipe' and plan = 'a' each say what the schedule is"),
        ({"timeout": 0.0}, "timeout must be a positive number of seconds"),
        ({"activation_checkpoint_interval": -1}, "activation_checkpoint_interval must be a number of layers, or 0"),
        ({"chunks": 0}, "chunks must be a positive number of stages"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PipeConfig(**settings)


def test_what_only_evaluates_is_not_among_what_trains() -> None:
    with pytest.raises(ValueError, match=r"there are gpipe, .*zb_v; for evaluation"):
        make_schedule("best", num_ranks=2, num_micro_batches=2)
