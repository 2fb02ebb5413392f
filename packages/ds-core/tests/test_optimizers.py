"""Optimizers by name and of the caller, over 1D shards."""

import pytest
import torch
from ds_core.optimizers import (
    OF_COMM,
    REFUSED,
    ClientMaker,
    TorchMaker,
    canonical_name,
    torch_optimizer,
)
from ds_core.protocols import BuildContext

CONTEXT = BuildContext(device=torch.device("cpu"))
KINDS = [
    kind
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in {"Optimizer", *REFUSED}
]


def shards(*sizes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size)) for size in sizes]


def take_steps(optimizer, params, num_steps=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num_steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach().clone() for param in params]


# By name #


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("spell", [str, str.lower, str.upper], ids=["as is", "lower", "upper"])
def test_torchs_classes_are_found_in_any_case_and_made_as_torch_does(kind, spell):
    params = {"lr": 0.05, "torch_adam": True} if kind.__name__ in ("Adam", "AdamW") else {"lr": 0.05}
    if kind is torch.optim.Adam:
        params["adam_w_mode"] = False
    made = torch_optimizer(spell(kind.__name__), params).build(None, CONTEXT)
    sizes = [(7, 2), (1, 1)]  # torch's Muon takes matrices only
    ours, theirs = shards(*sizes), shards(*sizes)
    got = take_steps(made.make([{"params": ours}]), ours)
    expected = take_steps(kind(theirs, lr=0.05), theirs)
    assert all(map(torch.equal, got, expected))


def test_names_of_others_are_left_alone():
    assert canonical_name("lion") == "Lion"
    assert canonical_name("Shampoo") == "Shampoo"


@pytest.mark.parametrize(
    ("name", "params", "kind", "settings"),
    [
        ("Adam", {"lr": 0.1}, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.0}),
        ("adam", {"adam_w_mode": False}, torch.optim.Adam, {"weight_decay": 0.0}),
        ("AdamW", {"adam_w_mode": False}, torch.optim.AdamW, {"weight_decay": 0.0}),
        ("AdamW", {"torch_adam": True}, torch.optim.AdamW, {}),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, torch.optim.Adam, {}),
        (
            "AdamW",
            {"weight_decay": 0.3, "betas": [0.8, 0.9]},
            torch.optim.AdamW,
            {"weight_decay": 0.3, "betas": (0.8, 0.9)},
        ),
        (
            "AdamW",
            {"bias_correction": True, "fp32_optimizer_states": True, "set_grad_none": False},
            torch.optim.AdamW,
            {"weight_decay": 0.0},
        ),
    ],
)
def test_adam_is_read_as_deepspeed_does(name, params, kind, settings):
    made = torch_optimizer(name, params)
    assert made.kind is kind
    assert made.settings == settings


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("SGD", {"learning_rate": 0.1}, r"optimizer.params.learning_rate = 0.1 is no setting of torch.optim.SGD.*lr"),
        ("SGD", {"momentun": 0.1}, r"did you mean 'momentum'"),
        ("SGD", {"lr": -1}, r"optimizer.params = \{'lr': -1\}: torch.optim.SGD refuses it: Invalid learning rate"),
        ("AdamW", {"lr": "5e-5"}, r"torch.optim.AdamW refuses it: .*; write lr without quotes$"),
        ("AdamW", {"bias_correction": False}, r"optimizer.params.bias_correction = False: torch's AdamW has True only"),
        ("AdamW", {"fp32_optimizer_states": False}, r"fp32_optimizer_states = False"),
        ("Adammm", {}, r"optimizer.type = 'Adammm' is neither an installed plugin \(Lion\) nor .*did you mean 'Adam"),
        *(
            (name, {}, rf"optimizer.type = '{name}' cannot be used, because it .*use one of: .*Adadelta")
            for name in REFUSED
        ),
    ],
)
def test_errors_name_the_setting(name, params, message):
    with pytest.raises(ValueError, match=message):
        torch_optimizer(name, params, plugins=("Lion",))


@pytest.mark.parametrize("name", ["OneBitAdam", "onebitlamb", "ZeroOneAdam", "muadam"])
def test_a_known_optimizer_that_is_not_provided_is_called_that(name):
    with pytest.raises(ValueError) as caught:
        torch_optimizer(name, {}, plugins=("AdamW", "Lamb"))
    message = str(caught.value)
    assert message.startswith(f"optimizer.type = {canonical_name(name)!r} is known, but not provided here")
    assert "(AdamW, Lamb)" in message
    assert "did you mean" not in message
    assert ("'pip install ds-comm' does" in message) == (canonical_name(name) in OF_COMM)


def test_a_groups_own_settings_win():
    first, second = shards(2, 2)
    maker = TorchMaker(kind=torch.optim.AdamW, settings={"lr": 0.1, "weight_decay": 0.5})
    optimizer = maker.make([{"params": [first]}, {"params": [second], "weight_decay": 0.0}])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_the_partitioner_runs_the_step():
    assert TorchMaker(kind=torch.optim.SGD, settings={}).update is None
    assert ClientMaker(torch.optim.SGD(shards(1), lr=0.1)).update is None


# Of the caller #


def test_the_object_and_its_groups_stay_the_same():
    first, second = shards(4, 6)
    optimizer = torch.optim.AdamW([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.2}])
    groups = list(optimizer.param_groups)
    flat = shards(4, 6)
    made = ClientMaker(optimizer).make([{"params": [flat[0]]}, {"params": [flat[1]]}])
    assert made is optimizer
    assert all(mine is before for mine, before in zip(optimizer.param_groups, groups, strict=True))
    assert [group["params"][0] for group in groups] == flat
    assert [group["lr"] for group in groups] == [0.1, 0.2]


def test_schedulers_of_the_caller_go_on_working():
    optimizer = torch.optim.SGD(shards(4), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    flat = shards(4)
    ClientMaker(optimizer).make([{"params": flat}])
    start = flat[0].detach().clone()
    for expected in (1.0, 0.5, 0.25):
        flat[0].grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
        start -= expected
    assert torch.equal(flat[0].detach(), start)


def test_an_optimizer_with_state_is_refused():
    params = shards(2)
    optimizer = torch.optim.AdamW(params, lr=0.1)
    take_steps(optimizer, params, num_steps=1)
    with pytest.raises(ValueError, match=r"already holds state of 1 parameters"):
        ClientMaker(optimizer)


def test_another_number_of_groups_is_refused():
    maker = ClientMaker(torch.optim.SGD(shards(1), lr=0.1))
    with pytest.raises(ValueError, match=r"has 1 parameter groups, the partitioned model has 2"):
        maker.make([{"params": shards(1)}, {"params": shards(1)}])


def test_what_cannot_run_on_shards_is_refused():
    with pytest.raises(ValueError, match=r"is a LBFGS, which evaluates the loss several times.*one of: .*Adadelta"):
        ClientMaker(torch.optim.LBFGS(shards(2)))


class Mine(torch.optim.SGD):
    """A class that nobody but its author knows."""


def test_an_unknown_class_needs_no_permission():
    optimizer = Mine(shards(2), lr=0.1)
    assert ClientMaker(optimizer).make([{"params": shards(2)}]) is optimizer
