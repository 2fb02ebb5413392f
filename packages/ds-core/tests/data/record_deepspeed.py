"""Record the numbers that DeepSpeed's own schedules and loss scaler give, for the tests beside this folder.

Needs deepspeed (0.19.8 was used), which the tests themselves do not: ``python record_deepspeed.py``.
"""

import json
import logging
import random
from pathlib import Path

import torch
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.utils import logger

LAST_STEP = 400
STEPS = [*range(48), *range(48, LAST_STEP, 7)]

WARMUPS = [
    {},
    {"warmup_num_steps": 1},
    {"warmup_num_steps": 2, "warmup_type": "linear"},
    {"warmup_num_steps": 37, "warmup_max_lr": 0.02},
    {"warmup_num_steps": 100, "warmup_type": "linear", "warmup_min_lr": 1e-5, "warmup_max_lr": 3e-4},
    {"warmup_num_steps": 33, "warmup_min_lr": [1e-4, 0.0], "warmup_max_lr": [1e-2, 5e-2]},
    {"warmup_num_steps": 20, "warmup_min_lr": 0.1, "warmup_max_lr": 0.001},
]
COSINES = [
    {"total_num_steps": 300},
    {"total_num_steps": 300, "warmup_num_steps": 1},
    {"total_num_steps": 250, "warmup_num_steps": 40, "warmup_type": "linear", "warmup_min_ratio": 0.1},
    {"total_num_steps": 390, "warmup_num_steps": 25, "cos_min_ratio": 0.0},
    {"total_num_steps": 120, "warmup_num_steps": 120, "cos_min_ratio": 0.3},
    {"total_num_steps": 50, "warmup_num_steps": 60},
]
CYCLES = [
    {"cycle_min_lr": 1e-4, "cycle_max_lr": 1e-2},
    {"cycle_min_lr": 0.0, "cycle_max_lr": 1e-2, "cycle_first_step_size": 60},
    {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.1, "cycle_first_step_size": 50, "cycle_second_step_size": 90},
    {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.1, "cycle_first_step_size": 40, "cycle_second_step_size": 0},
    {
        "cycle_min_lr": 1e-3,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 60,
        "cycle_first_stair_count": 6,
        "cycle_second_step_size": 33,
        "cycle_second_stair_count": 4,
        "cycle_min_mom": 0.7,
        "cycle_max_mom": 0.95,
    },
    {
        "cycle_min_lr": 1e-3,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 45,
        "cycle_first_stair_count": 5,
        "decay_step_size": 10,
        "decay_lr_rate": 0.5,
        "decay_mom_rate": 0.01,
    },
    {
        "cycle_min_lr": [1e-3, 2e-3],
        "cycle_max_lr": [0.1, 0.3],
        "cycle_first_step_size": 70,
        "decay_step_size": 7,
        "decay_lr_rate": 0.001,
        "cycle_momentum": False,
    },
    {
        "cycle_min_lr": 1e-3,
        "cycle_max_lr": 0.1,
        "cycle_first_step_size": 30,
        "decay_step_size": 5,
        "decay_mom_rate": 0.02,
    },
    {"cycle_min_lr": 1e-3, "cycle_max_lr": 0.1, "cycle_first_step_size": 30, "decay_lr_rate": 0.3},
]
RANGES = [
    {},
    {"lr_range_test_min_lr": 1e-5, "lr_range_test_step_size": 30, "lr_range_test_step_rate": 5.0},
    {"lr_range_test_step_size": 30, "lr_range_test_staircase": True},
    {"lr_range_test_min_lr": [1e-4, 1e-3], "lr_range_test_step_size": 11, "lr_range_test_step_rate": 0.3},
]
CASES = [
    *[("WarmupLR", params) for params in WARMUPS],
    *[("WarmupDecayLR", {"total_num_steps": 350, **params}) for params in WARMUPS if params],
    ("WarmupDecayLR", {"total_num_steps": 60, "warmup_num_steps": 60, "warmup_max_lr": 0.01}),
    ("WarmupDecayLR", {"total_num_steps": 40, "warmup_num_steps": 60, "warmup_max_lr": 0.01}),
    *[("WarmupCosineLR", params) for params in COSINES],
    *[("OneCycle", params) for params in CYCLES],
    *[("LRRangeTest", params) for params in RANGES],
]
SCALES = [
    {"window": 5, "hysteresis": 1, "consecutive": False, "min_scale": 1, "power": 16, "rate": 0.05},
    {"window": 5, "hysteresis": 2, "consecutive": False, "min_scale": 1, "power": 16, "rate": 0.1},
    {"window": 3, "hysteresis": 3, "consecutive": False, "min_scale": 1, "power": 16, "rate": 0.2},
    {"window": 4, "hysteresis": 3, "consecutive": True, "min_scale": 1, "power": 16, "rate": 0.3},
    {"window": 7, "hysteresis": 2, "consecutive": True, "min_scale": 8, "power": 12, "rate": 0.15},
    {"window": 1, "hysteresis": 1, "consecutive": False, "min_scale": 3, "power": 10, "rate": 0.4},
    {"window": 10, "hysteresis": 1, "consecutive": False, "min_scale": 1, "power": 4, "rate": 0.5},
    {"window": 1000, "hysteresis": 2, "consecutive": False, "min_scale": 1, "power": 16, "rate": 0.01},
]


def groups_of(optimizer):
    return [[group["lr"], *([group["betas"][0]] if "betas" in group else [])] for group in optimizer.param_groups]


def record_schedule(name, params):
    num_groups = max((len(value) for value in params.values() if isinstance(value, list)), default=1)
    base_lrs = [0.01 * (index + 1) for index in range(num_groups)]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in base_lrs]
    kind = torch.optim.AdamW if name == "OneCycle" else torch.optim.SGD
    optimizer = kind(groups, lr=0.1)
    schedule = getattr(lr_schedules, name)(optimizer, **params)
    rows = {-1: groups_of(optimizer)}
    for step in range(LAST_STEP):
        schedule.step()
        rows[step] = groups_of(optimizer)
    keep = [rows[step] for step in [-1, *STEPS]]
    return {
        "type": name,
        "params": params,
        "base_lrs": base_lrs,
        "lrs": [[group[0] for group in row] for row in keep],
        "betas": [[group[1] for group in row] for row in keep] if len(keep[0][0]) > 1 else None,
    }


def record_scale(case, seed):
    draw = random.Random(seed)
    overflows = [draw.random() < case["rate"] for _ in range(300)]
    scaler = loss_scaler.DynamicLossScaler(
        init_scale=2 ** case["power"],
        scale_window=case["window"],
        min_scale=case["min_scale"],
        delayed_shift=case["hysteresis"],
        consecutive_hysteresis=case["consecutive"],
    )
    scales = []
    for overflow in overflows:
        try:
            scaler.update_scale(overflow)
        except Exception:  # noqa: BLE001 - what is raised at the minimum is a bare Exception
            break
        scales.append(scaler.cur_scale)
    return {**case, "overflows": "".join("01"[overflow] for overflow in overflows), "scales": scales}


def write(name, value):
    text = json.dumps(value, separators=(",", ":"))
    Path(__file__).with_name(name).write_text(
        text.replace('{"type"', '\n{"type"').replace('{"window"', '\n{"window"') + "\n"
    )


def main():
    logger.setLevel(logging.ERROR)
    loss_scaler.dist.get_rank = lambda: 0
    write("schedules.json", {"steps": [-1, *STEPS], "cases": [record_schedule(*case) for case in CASES]})
    write("loss_scales.json", [record_scale(case, seed) for seed, case in enumerate(SCALES)])


if __name__ == "__main__":
    main()
