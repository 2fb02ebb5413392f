"""State that leaves for host memory between steps of the engine and comes back: the bits of a run without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import ds_core
import pytest
import torch
from ds_testkit import Rank, RankPool
from ds_testkit.models import micro_batch, seeded
from ds_testkit.state import Exported, assembled, assert_same_bits, exported

pytestmark = pytest.mark.rung_c


class Setting(NamedTuple):
    stage: int
    precision: str = "bf16"
    include: tuple[str, ...] | None = None  # what is moved away; None: all
    parked: bool = True  # whether anything is


class Move(NamedTuple):
    """What came of moving states away and back."""

    freed: dict[str, int]
    expected: int  # bytes, as the partitioner counts them
    returned: int  # bytes
    refusals: list[str]


class Outcome(NamedTuple):
    pieces: list[Exported]
    losses: list[float]
    moves: list[Move]


@contextmanager
def movable() -> Iterator[None]:
    """Let states on a CPU be moved, as if it were another device than the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ds_zero.parking._is_on_host", lambda storage: False)
        patch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)
        yield


def engine_of(rank: Rank, setting: Setting) -> ds_core.Engine:
    config: dict[str, Any] = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        # memory that ranks share has a fixed size
        "zero_optimization": {"stage": setting.stage, "host_memory": False},
    }
    if setting.precision != "fp32":
        config[setting.precision] = {"enabled": True}
    return ds_core.initialize(seeded(dropout=0.1), config=config, group=rank.group).engine


def refusals(engine: ds_core.Engine, folder: str) -> list[str]:
    """Try what may not be done meanwhile; return the texts of the errors."""
    sharded: Any = engine._sharded
    actions: list[Callable[[], object]] = [
        lambda: engine(micro_batch(0)),
        engine.step if sharded.micro_batches else lambda: engine.save_checkpoint(folder),
        lambda: engine.save_16bit_model(folder),
        engine.module_state_dict,
        lambda: engine.access.full_param("norm.weight"),
        engine.offload_states,
    ]
    texts = []
    for action in actions:
        with pytest.raises(RuntimeError) as error:
            action()
        texts.append(str(error.value))
    return texts


def move(engine: ds_core.Engine, setting: Setting, folder: str) -> Move:
    sharded: Any = engine._sharded
    report = sharded.memory()
    with movable():
        freed = engine.offload_states(setting.include)
    texts = refusals(engine, folder)
    return Move(freed, report.param + report.grad + report.state, engine.reload_states(), texts)


def trained(rank: Rank, setting: Setting, folder: str) -> Outcome:
    """Four steps of four micro-batches; state is away between two of them, and once more before an update."""
    engine = engine_of(rank, setting)
    losses, moves = [], []
    for index in range(rank.rank, 16, rank.size):
        if setting.parked and index - rank.rank == 8:
            moves.append(move(engine, setting, folder))
        losses.append(engine.backward(engine(micro_batch(index))).item())
        if setting.parked and index - rank.rank == 12 - rank.size:
            moves.append(move(engine, setting, folder))
        engine.step()
    return Outcome(exported(engine._sharded), losses, moves)


def assert_moved_in_vain(moved: list[Outcome], stayed: list[Outcome]) -> None:
    """Moving changed no bit, and whatever was tried meanwhile was refused."""
    assert_same_bits(assembled(each.pieces for each in moved), assembled(each.pieces for each in stayed))
    assert [each.losses for each in moved] == [each.losses for each in stayed]
    for outcome in moved:
        assert len(outcome.moves) == 2
        for each in outcome.moves:
            assert sum(each.freed.values()) == each.returned > 0
            assert set(each.refusals) == {"states of this model are in host memory: call reload_states() first"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_states_come_back_as_they_were(ranks: RankPool, tmp_path: Any, stage: int, precision: str) -> None:
    setting = Setting(stage, precision)
    moved = ranks.run(trained, setting, str(tmp_path), size=2)
    stayed = ranks.run(trained, setting._replace(parked=False), str(tmp_path), size=2)
    assert_moved_in_vain(moved, stayed)
    for each in (each for outcome in moved for each in outcome.moves):
        assert list(each.freed) == ["params", "masters", "optimizer", "gradients"]
        assert each.returned >= each.expected
    assert list(tmp_path.iterdir()) == []


def test_some_states_are_moved_by_deepspeeds_names(ranks: RankPool, tmp_path: Any) -> None:
    setting = Setting(3, include=("optim_states", "hp_params"))
    moved = ranks.run(trained, setting, str(tmp_path), size=2)
    stayed = ranks.run(trained, setting._replace(parked=False), str(tmp_path), size=2)
    assert_moved_in_vain(moved, stayed)
    for each in (each for outcome in moved for each in outcome.moves):
        assert list(each.freed) == ["optimizer", "masters"]
        assert min(each.freed.values()) > 0


def unmoved(rank: Rank) -> list[dict[str, int]]:
    engine = engine_of(rank, Setting(2))
    freed = engine.offload_states()
    engine.backward(engine(micro_batch(0)))
    return [freed, {"returned": engine.reload_states()}]


def test_on_a_cpu_there_is_nothing_to_be_gained(ranks: RankPool) -> None:
    want = [dict.fromkeys(("params", "masters", "optimizer", "gradients"), 0), {"returned": 0}]
    assert ranks.run(unmoved, size=2) == [want, want]
