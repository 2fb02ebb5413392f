"""A model cut into stages: the names, the initial values and the bits of the whole one, wherever it is cut."""

from __future__ import annotations

import copy
import pydoc
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from ds_pipe import Pipeline, PipelineModule, make_schedule
from ds_pipe.alarm import PipelineError
from ds_pipe.config import PipeConfig
from ds_pipe.layers import LayerSpec, TiedLayerSpec
from ds_pipe.part import Part
from ds_pipe.plugin import pipe
from ds_pipe.skips import Skip
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH, WORDS, MICRO_BATCHES = 6, 11, 4
CUTS = [[0, 6], [0, 3, 6], [0, 1, 4, 6], [0, 1, 2, 3, 4, 5, 6]]


class Block(nn.Module):
    """Takes and gives a tuple; has a dropout, a buffer, and a parameter outside of linear layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.first, self.second = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH, bias=False)
        self.register_buffer("scale", torch.rand(1))

    def forward(self, value: tuple[Tensor, int]) -> tuple[Tensor, int]:
        hidden, count = value
        inner = functional.gelu(self.first(self.norm(hidden))) * self.scale
        return hidden + self.drop(self.second(inner)), count + 1


def to_tuple(hidden: Tensor) -> tuple[Tensor, int]:
    return hidden, 0


def of_tuple(value: tuple[Tensor, int]) -> Tensor:
    assert value[1] == 2
    return value[0]


def loss_of(out: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(out.flatten(0, -2), target.flatten())


def model(dropout: float = 0.0, **settings: Any) -> PipelineModule:
    block = LayerSpec(Block, dropout=dropout)
    specs = [
        LayerSpec(nn.Embedding, WORDS, WIDTH),
        to_tuple,
        block,
        block,
        of_tuple,
        LayerSpec(nn.Linear, WIDTH, WORDS),
    ]
    return PipelineModule(specs, loss_fn=loss_of, **settings)


def micro_batches() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    made = [torch.randint(0, WORDS, (2, 6), generator=generator) for _ in range(MICRO_BATCHES)]
    return [tokens[:, :-1] for tokens in made], [tokens[:, 1:] for tokens in made]


def parts_of(model: PipelineModule, bounds: list[int]) -> list[Part]:
    return [model.build(first, last) for first, last in pairwise(bounds)]


class Numbered(nn.Module):
    """Gives each forward pass its key; schedules of one rank take micro-batches in order."""

    def __init__(self, part: Part, **borrowed: nn.Parameter) -> None:
        super().__init__()
        self.part, self.count, self.borrowed = part, 0, nn.ParameterDict(borrowed)

    def forward(self, value: Any) -> Any:
        with self.part.keyed(seed=3, micro_batch=self.count):
            self.count += 1
            return self.part(value, skips=dict(self.borrowed))


def gradients(
    parts: list[Part], name: str = "interleaved", wrap: Callable[[Part], nn.Module] = Numbered
) -> tuple[list[float], dict[str, Tensor]]:
    """Return losses and gradients of one step of a pipeline on one rank."""
    chunks = None if name == "zb_v" else len(parts)
    schedule = make_schedule(name, num_ranks=1, num_micro_batches=MICRO_BATCHES, num_chunks=chunks)
    pipeline = Pipeline(schedule, dict(enumerate(map(wrap, parts))), None, loss=loss_of)
    losses = [loss.item() for loss in pipeline.run(*micro_batches())]
    return losses, {n: p.grad for part in parts for n, p in part.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), name


def values(parts: list[Part]) -> dict[str, Tensor]:
    named = [entry for part in parts for entry in (*part.named_parameters(), *part.named_buffers())]
    assert len(dict(named)) == len(named)
    return dict(named)


@pytest.mark.parametrize("bounds", CUTS)
def test_names_and_initial_values_are_those_of_the_whole_model(bounds: list[int]) -> None:
    torch.manual_seed(len(bounds))  # does not matter
    state = torch.random.get_rng_state()
    whole = nn.Sequential()
    for index, cls in enumerate((lambda: nn.Embedding(WORDS, WIDTH), nn.Identity, Block, Block, nn.Identity)):
        torch.manual_seed(1234 + index)
        whole.append(cls())
    torch.manual_seed(1239)
    whole.append(nn.Linear(WIDTH, WORDS))
    torch.random.set_rng_state(state)
    found = values(parts_of(model(), bounds))
    assert_equal(found, {**dict(whole.named_parameters()), **dict(whole.named_buffers())})
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeds() -> None:
    torch.manual_seed(5)
    first = values([model(seed_layers=False).build(0, 6)])
    torch.rand(3)
    assert_equal(values(parts_of(model(seed_layers=False), [0, 2, 6])), first)
    assert_equal(values(parts_of(model(base_seed=5), [0, 3, 6])), first)
    torch.manual_seed(6)
    assert not torch.equal(values([model(seed_layers=False).build(0, 6)])["0.weight"], first["0.weight"])


@pytest.mark.parametrize("interval", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "bounds"), [("interleaved", bounds) for bounds in CUTS[1:]] + [("zb_v", [0, 3, 6]), ("zb_v", [0, 2, 6])]
)
def test_bits_do_not_depend_on_the_cut(name: str, bounds: list[int], interval: int) -> None:
    """Of losses and gradients, with dropout; with layers recomputed, and with weight gradients computed later."""
    whole = gradients([model(dropout=0.4).build(0, 6)], "gpipe")
    found = gradients(parts_of(model(dropout=0.4, activation_checkpoint_interval=interval), bounds), name)
    assert found[0] == whole[0]
    assert_equal(found[1], whole[1])
    assert len(found[1]) == 1 + 2 * 5 + 2


def test_dropout_without_a_key_is_recomputed_as_it_was() -> None:
    results = []
    for interval in (0, 2):
        torch.manual_seed(1)
        part = model(dropout=0.4, activation_checkpoint_interval=interval).build(0, 6)
        results.append(gradients([part], "gpipe", wrap=nn.Sequential))
    assert results[0][0] == results[1][0]
    assert_equal(results[1][1], results[0][1])


class Counted(nn.Linear):
    """Counts its forward passes and what is alive of them."""

    passes = 0

    def forward(self, given: Tensor) -> Tensor:
        Counted.passes += 1
        return super().forward(given)


def test_layers_are_recomputed_and_weight_gradients_stay_deferred() -> None:
    specs = [LayerSpec(Counted, *sizes) for sizes in ((4, 5), (5, 3), (3, 6), (6, 2))]
    whole = PipelineModule(specs).build(0, 4)
    given = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole(given).square().sum().backward()
    part = PipelineModule(specs, activation_checkpoint_interval=2).build(0, 4)
    from ds_pipe.deferred import DeferredWeights

    Counted.passes = 0
    later = DeferredWeights()
    with later:
        out = part(given).square().sum()
    assert Counted.passes == 4
    (grad,) = later.grad([out], [None], [given])
    assert Counted.passes == 8
    assert grad is not None
    assert given.grad is not None
    assert torch.equal(grad, given.grad)
    assert all(p.grad is None for p in part.parameters())
    later.settle()
    assert_equal({n: p.grad for n, p in part.named_parameters()}, {n: p.grad for n, p in whole.named_parameters()})
    with torch.no_grad():
        part(given)
    assert Counted.passes == 12


class Recomputed(nn.Module):
    """Has checkpoints of its own, one within the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)
        self.norm = nn.LayerNorm(9)

    def inner(self, given: Tensor) -> Tensor:
        return functional.gelu(self.norm(self.first(given)))

    def whole(self, given: Tensor) -> Tensor:
        return self.second(self.keep(self.inner, given)).tanh()

    def keep(self, function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        return checkpoint(function, given, use_reentrant=False)  # type: ignore[no-any-return]  # torch's

    def forward(self, given: Tensor) -> Tensor:
        return given + self.keep(self.whole, given)


class Plain(Recomputed):
    """The same without checkpoints."""

    def keep(self, function: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        return function(given)


@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zb_v"])
@pytest.mark.parametrize("interval", [0, 2])
def test_layers_may_have_checkpoints_of_their_own(name: str, interval: int) -> None:
    results = []
    for kind, schedule, bounds in (
        (Plain, "gpipe", [0, 4]),
        (Recomputed, name, [0, 2, 4] if name == "zb_v" else [0, 4]),
    ):
        specs = [
            LayerSpec(nn.Embedding, WORDS, WIDTH),
            LayerSpec(kind),
            LayerSpec(kind),
            LayerSpec(nn.Linear, WIDTH, WORDS),
        ]
        described = PipelineModule(specs, activation_checkpoint_interval=interval if kind is Recomputed else 0)
        results.append(gradients(parts_of(described, bounds), schedule))
    (want_losses, want), (losses, found) = results
    assert losses == want_losses
    assert_equal(found, want)


class Again(torch.autograd.Function):
    """Runs a layer again in its backward pass, and computes its gradients there: of copies, or of the weights."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor, copies: bool) -> Tensor:
        ctx.save_for_backward(given, weight, bias)
        ctx.copies = copies
        return functional.linear(given, weight, bias).tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        given, weight, bias = ctx.saved_tensors
        if ctx.copies:
            weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
        given = given.detach().requires_grad_()
        with torch.enable_grad():
            out = functional.linear(given, weight, bias).tanh()
        if ctx.copies:
            torch.autograd.backward(out, grads)
            return given.grad, weight.grad, bias.grad, None
        return *torch.autograd.grad(out, [given, weight, bias], grads), None


class RunsAgain(nn.Module):
    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.copies, self.layer = copies, nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        return Again.apply(given, self.layer.weight, self.layer.bias, self.copies)  # type: ignore[no-any-return, no-untyped-call]  # torch's


@pytest.mark.parametrize("name", ["zb_h1", "zb_v"])
@pytest.mark.parametrize("copies", [True, False])
def test_functions_may_compute_gradients_of_their_own(name: str, copies: bool) -> None:
    head = LayerSpec(nn.Linear, WIDTH, WORDS)
    described = PipelineModule([LayerSpec(nn.Embedding, WORDS, WIDTH), *2 * [LayerSpec(RunsAgain, copies)], head])
    want_losses, want = gradients([described.build(0, 4)], "gpipe")
    losses, found = gradients(parts_of(described, [0, 2, 4] if name == "zb_v" else [0, 4]), name)
    assert losses == want_losses
    assert_equal(found, want)
    assert len(found) == 1 + 2 * 2 + 2


@pytest.mark.parametrize("name", ["gpipe", "zb_h1"])
def test_a_loss_is_a_scalar(name: str) -> None:
    schedule = make_schedule(name, num_ranks=1, num_micro_batches=1)
    pipeline = Pipeline(schedule, {0: nn.Linear(2, 3)}, None, loss=lambda out, target: (out - target).square())
    with pytest.raises((ValueError, RuntimeError), match="scalar"):
        pipeline.run([torch.ones(4, 2)], [torch.ones(4, 3)])


@pytest.mark.parametrize(("said", "configured", "passes"), [(0, 2, 8), (2, 0, 8), (0, 0, 4)])
def test_a_configuration_may_say_what_is_recomputed(said: int, configured: int, passes: int) -> None:
    specs = [LayerSpec(Counted, 4, 4) for _ in range(4)]
    described = PipelineModule(specs, loss_fn=loss_of, activation_checkpoint_interval=said)
    builder = pipe.build(PipeConfig(activation_checkpoint_interval=configured), context=None)  # type: ignore[arg-type]  # not read
    part = builder.cut(described, rank=0, num_ranks=1, num_micro_batches=1).modules[0]
    Counted.passes = 0
    part(torch.ones(3, 4, requires_grad=True)).sum().backward()
    assert Counted.passes == passes


@pytest.mark.parametrize(
    ("method", "want"), [("uniform", [0, 3, 6]), ("parameters", [0, 3, 6]), ("type:^block$", [0, 3, 6])]
)
def test_bounds(method: str, want: list[int]) -> None:
    made = model(partition_method=method)
    assert made.bounds(2) == want
    assert made.bounds(2, seconds=[5, 0, 1, 1, 1, 2]) == [0, 2, 6]
    whole, parts = (values(parts_of(made, bounds)) for bounds in ([0, 6], made.bounds(2)))
    assert_equal(parts, whole)


def test_parameters_are_counted_without_making_them() -> None:
    huge = [LayerSpec(nn.Linear, 10**6, 10**6) for _ in range(3)] + [nn.ReLU()]
    assert PipelineModule(huge).bounds(3) == [0, 1, 2, 4]

    class Odd(nn.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, int(torch.ones(()).item()))

    assert PipelineModule([LayerSpec(Odd, 2), LayerSpec(Odd, 9), LayerSpec(Odd, 2)]).bounds(2) in ([0, 1, 3], [0, 2, 3])


def test_a_sequential() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(WIDTH, WIDTH)
    plain = nn.Sequential()
    for name, module in {"in": nn.Linear(3, WIDTH), "a": shared, "act": nn.Tanh(), "b": shared}.items():
        plain.add_module(name, module)
    made = PipelineModule.from_sequential(plain)
    assert made.layer_names == ["in (Linear)", "a (Linear)", "act (Tanh)", "a (Linear) again"]
    whole = made.build(0, 4)
    assert [name for name, _ in whole.named_parameters()] == [name for name, _ in plain.named_parameters()]
    given = torch.rand(2, 3)
    assert torch.equal(whole(given), plain(given))
    assert made.ties == {"a.weight": ((1, 3), ("a.weight", "a.weight")), "a.bias": ((1, 3), ("a.bias", "a.bias"))}
    with pytest.raises(ValueError, match=r"layers \[1, 3\] have the parameter a.weight in common .* borrow it"):
        made.build(2, 4)
    last = made.build(2, 4, borrows={"a.weight": "w", "a.bias": "b"})
    assert not [*last.parameters()]
    assert torch.equal(last(made.build(0, 2)(given), skips={"w": shared.weight, "b": shared.bias}), plain(given))
    with pytest.raises(ValueError, match=r"the part takes the skips \['b', 'w'\]; got \['w'\]"):
        last(given, skips={"w": shared.weight})
    assert made.loans([0, 2, 4])[0] == (0, 1, "a.weight", "a.weight@1", "a.weight")
    assert shared.weight is not None


def logits(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, embedding.weight)


class Scaled(nn.Module):
    """A head of another class, with a weight of its own beside the tied one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WORDS)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


SAME = TiedLayerSpec("embed", nn.Embedding, WORDS, WIDTH, forward_fn=logits)
OTHER = TiedLayerSpec("embed", Scaled, tied_weight_attr="inner.weight")


@pytest.mark.parametrize(("head", "own"), [(SAME, []), (OTHER, ["3.inner.bias"])])
@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize("name", ["interleaved", "zb_v"])
def test_tied_layers(head: TiedLayerSpec, own: list[str], interval: int, name: str) -> None:
    embed = TiedLayerSpec("embed", nn.Embedding, WORDS, WIDTH)
    made = PipelineModule(
        [embed, LayerSpec(nn.Linear, WIDTH, WIDTH), nn.Tanh(), head], activation_checkpoint_interval=interval
    )
    assert made.ties["embed"].layers == (0, 3)
    whole = made.build(0, 4)
    want = gradients([whole], "gpipe")
    names = [name for name, _ in whole.named_parameters()]
    assert names == ["0.weight", "1.weight", "1.bias", *own]
    with pytest.raises(ValueError, match=r"part with the layers 2 ... 3 has layer 3 without layer 0: borrow it"):
        made.build(2, 4)

    first = made.build(0, 2)
    copied = nn.Parameter(first.get_parameter("0.weight").detach().clone())
    last = made.build(2, 4, borrows={"embed": "weight"})
    assert [name for name, _ in last.named_parameters()] == own
    assert_equal(values([first, last]), values([whole]))
    found = gradients(
        [first, last], name, wrap=lambda part: Numbered(part, weight=copied) if part is last else Numbered(part)
    )
    assert found[0] == want[0]
    for key in [*own, "1.weight", "1.bias"]:
        assert torch.equal(found[1][key], want[1][key])
    # the two uses of a micro-batch are added up first in the whole model
    torch.testing.assert_close(found[1]["0.weight"] + copied.grad, want[1]["0.weight"])


@pytest.mark.parametrize("interval", [0, 1])
@pytest.mark.parametrize(
    ("name", "bounds"), [("interleaved", [0, 2, 4]), ("interleaved", [0, 1, 2, 3, 4]), ("zb_v", [0, 2, 4])]
)
@pytest.mark.parametrize("head", [SAME, OTHER])
def test_tied_layers_in_a_pipeline_have_the_bits_of_the_whole_model(
    head: TiedLayerSpec, name: str, bounds: list[int], interval: int
) -> None:
    embed = TiedLayerSpec("embed", nn.Embedding, WORDS, WIDTH)
    layers = [embed, LayerSpec(nn.Linear, WIDTH, WIDTH), nn.Tanh(), head]
    made = PipelineModule(layers, activation_checkpoint_interval=interval)
    want = gradients([made.build(0, 4)], "gpipe", wrap=nn.Sequential)
    loans = made.loans(bounds)
    parts = [
        made.build(first, last, borrows={loan.key: loan.skip for loan in loans if loan.target == stage})
        for stage, (first, last) in enumerate(pairwise(bounds))
    ]
    schedule = make_schedule(
        name, num_ranks=1, num_micro_batches=MICRO_BATCHES, num_chunks=None if name == "zb_v" else len(parts),
        skips=[Skip(loan.source, loan.target, loan.skip, constant=True) for loan in loans],
    )  # fmt: skip
    lends = {loan.skip: parts[loan.source].get_parameter(loan.weight) for loan in loans}
    pipeline = Pipeline(schedule, dict(enumerate(parts)), None, loss=loss_of, lends=lends)
    assert [loss.item() for loss in pipeline.run(*micro_batches())] == want[0]
    assert_equal({key: p.grad for part in parts for key, p in part.named_parameters()}, want[1])


def test_the_gradient_of_a_lent_weight_comes_with_that_of_the_input() -> None:
    from ds_pipe.deferred import DeferredWeights

    made = PipelineModule([TiedLayerSpec("w", nn.Linear, 4, 4), nn.Tanh(), TiedLayerSpec("w", nn.Linear, 4, 4)])
    with pytest.raises(RuntimeError, match="meta"):  # the bias is not tied
        made.build(1, 3, borrows={"w": "w"})(torch.ones(2, 4), skips={"w": torch.ones(4, 4)})
    specs = [
        TiedLayerSpec("w", nn.Linear, 4, 4, bias=False),
        nn.Tanh(),
        TiedLayerSpec("w", nn.Linear, 4, 4, bias=False),
    ]
    weight, later = torch.ones(4, 4, requires_grad=True), DeferredWeights()
    part = PipelineModule(specs).build(1, 3, borrows={"w": "w"})
    with later:
        out = part(torch.ones(2, 4, requires_grad=True), skips={"w": weight})
    out.sum().backward()
    assert weight.grad is not None


def test_a_part_is_a_module_like_others() -> None:
    part = model(dropout=0.5).build(2, 6)
    assert torch.equal(copy.deepcopy(part).eval()((torch.ones(1, WIDTH), 0)), part.eval()((torch.ones(1, WIDTH), 0)))
    part.add_module("5", nn.Identity())  # whoever replaces a layer is heard
    assert part((torch.ones(1, WIDTH), 0)).shape == (1, WIDTH)
    state = part.state_dict()
    part.load_state_dict(state)
    assert "2.first.weight" in state


class Table(nn.Module):
    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.table


def test_what_cannot_be_described() -> None:
    with pytest.raises(TypeError, match="layer 1 has to be a LayerSpec, a module or a function; got 3"):
        PipelineModule([nn.ReLU(), 3])
    with pytest.raises(TypeError, match="LayerSpec takes a class and its arguments"):
        LayerSpec(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not a module that is made .* got Linear\(in_features=2"):
        LayerSpec(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="not a module that is made"):
        TiedLayerSpec("embed", nn.Embedding(2, 2))
    with pytest.raises(ValueError, match="at least one layer"):
        PipelineModule([])
    with pytest.raises(ValueError, match=r"one of 'uniform', .* got 'best'"):
        model(partition_method="best")
    with pytest.raises(ValueError, match="number of layers, or 0; got -1"):
        model(activation_checkpoint_interval=-1)
    with pytest.raises(ValueError, match=r"no layer's class matches 'x' .* got Embedding, to_tuple, Block"):
        model(partition_method="type:x").bounds(2)
    with pytest.raises(ValueError, match="seconds of 6 layers are needed; got 1"):
        model().bounds(1, seconds=[1.0])
    with pytest.raises(ValueError, match="got first=3, last=3"):
        model().build(3, 3)
    table = torch.ones(1)
    with pytest.raises(ValueError, match=r"buffer 0.table is also 1.table of layer 1, and layer 1 begins another part"):
        PipelineModule([Table(table), Table(table)]).build(1, 2)
    with pytest.raises(ValueError, match=r"layer 0 has no parameter 'wait', it has weight, bias"):
        PipelineModule(2 * [TiedLayerSpec("a", nn.Linear, 2, 2, tied_weight_attr="wait")]).build(0, 2)


@pytest.mark.parametrize("name", ["parameters", "named_parameters", "to", "cuda", "train", "eval"])
def test_a_description_is_no_module(name: str) -> None:
    described = PipelineModule([nn.Linear(2, 2)])
    with pytest.raises(AttributeError, match=r"is a description, not a module: .*(initialize|engine)"):
        getattr(described, name)
    assert not hasattr(described, name)
    assert "partition_method" in pydoc.render_doc(PipelineModule)  # as help() prints


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"topology": "grid"}, r"no argument topology \(got 'grid'\): say num_stages, the ranks of one pipeline"),
        ({"checkpointable_layers": None}, "checkpointable_layers .*: activation_checkpoint_interval takes all layers"),
        ({"seed_fn": print}, "seed_fn .*: each layer is made from base_seed and its index; leave it out"),
        ({"dynamic_shape": True}, "dynamic_shape .*: micro-batches may have any shapes; leave it out"),
        ({"stages": 3}, r"no argument stages \(got 3\); help\(PipelineModule\) lists"),
    ],
)
def test_arguments_that_are_elsewhere(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        PipelineModule([nn.Linear(2, 2)], **arguments)
    with pytest.raises(TypeError, match=text):
        PipelineModule.from_sequential(nn.Sequential(nn.Linear(2, 2)), **arguments)


@pytest.mark.parametrize("interval", [0, 2])
def test_errors_name_the_layer(interval: int) -> None:
    layers = [LayerSpec(nn.Linear, 2, 3), nn.Tanh(), LayerSpec(nn.Linear, 4, 5)]
    described = PipelineModule(layers, activation_checkpoint_interval=interval, loss_fn=nn.functional.mse_loss)
    pipeline = Pipeline(
        make_schedule("gpipe", num_ranks=1, num_micro_batches=1),
        {0: described.build(0, 3)},
        None,
        loss=described.loss_fn,
    )
    with pytest.raises(PipelineError, match=r"F0\.0: RuntimeError: mat1 .*, in layer 2 \(Linear\)$") as found:
        pipeline.run([torch.ones(1, 2)], [torch.ones(1, 5)])
    assert vars(found.value.__cause__)["__notes__"] == ["in layer 2 (Linear)"]
    named = PipelineModule.from_sequential(nn.Sequential(OrderedDict(head=nn.Linear(2, 3), same=nn.Linear(4, 4))))
    with pytest.raises(RuntimeError, match="mat1") as found_there:
        named.build(0, 2)(torch.ones(1, 2))
    assert vars(found_there.value)["__notes__"] == ["in layer same (Linear)"]


def test_errors_of_a_constructor_name_the_layer() -> None:
    described = PipelineModule([nn.Tanh(), LayerSpec(nn.Linear, 2)])
    for wrong in (lambda: described.build(0, 2), lambda: described.bounds(1)):
        with pytest.raises(TypeError, match="out_features") as found:
            wrong()
        assert vars(found.value)["__notes__"] == ["where layer 1 (Linear) is made"]


def test_errors_name_a_tied_layer_that_runs_again() -> None:
    layers = [TiedLayerSpec("w", nn.Linear, 2, 2), nn.Tanh(), TiedLayerSpec("w", nn.Linear, 2, 2, forward_fn=divided)]
    with pytest.raises(ZeroDivisionError) as found:
        PipelineModule(layers).build(0, 3)(torch.ones(1, 2))
    assert vars(found.value)["__notes__"] == ["in layer 2, again 0 (Linear)"]


def divided(module: nn.Module, value: Tensor) -> Tensor:
    return value * (1 // 0)


def test_outlines_tell_models_apart() -> None:
    def outline(*layers: Any, bounds: tuple[int, ...] = (0, 1, 3)) -> str:
        return PipelineModule(layers).outline(bounds)

    tied = [TiedLayerSpec(key, nn.Linear, 2, 2) for key in "ab"]
    rows = [
        (nn.Tanh(), LayerSpec(nn.Linear, 2, 2), lambda value: value),
        (nn.Tanh(), nn.Linear(2, 2), to_tuple),
        (nn.Tanh(), nn.Tanh(), nn.Linear(2, 2)),
        (tied[0], tied[0], tied[0]),
        (tied[0], tied[1], tied[0]),
        (*[LayerSpec(nn.Linear, 2, 2)] * 4,),
        (*[LayerSpec(nn.Linear, 2, 2)] * 5,),
    ]
    found = [outline(*row) for row in rows]
    assert len({*found, outline(*rows[0], bounds=(0, 2, 3))}) == len(rows) + 1
    assert outline(nn.Tanh(), LayerSpec(nn.Linear, 2, 2), lambda value: value) == found[0]  # of other objects


def test_what_a_description_looks_like() -> None:
    few = PipelineModule([nn.Embedding(3, 2), *[nn.Linear(2, 2) for _ in range(6)], nn.Tanh()], num_stages=2)
    assert repr(few) == "PipelineModule of 8 layers, 1 Embedding, 6 Linear, 1 Tanh; num_stages=2, 0 tied, without loss"
    many = PipelineModule([nn.Linear(2, 2), nn.Tanh()] * 50, loss_fn=nn.functional.mse_loss)
    assert len(repr(many)) < 200
