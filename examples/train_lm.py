"""Train a byte-level GPT on source code, on as many processes as you like.

    ds run --nproc 2 examples/train_lm.py                     # trains on Python's own standard library
    ds run --nproc 2 examples/train_lm.py --data DIR          # on any folder of text
    ds run --nproc 1 examples/train_lm.py --resume            # goes on from the last checkpoint, on another number

The configuration is a DeepSpeed JSON file; the only lines that belong to ds are marked with "ds:".
"""

from __future__ import annotations

import argparse
import gc
import sys
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain, repeat
from pathlib import Path

import ds_core
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

HERE = Path(__file__).parent
CONTEXT = 256
STEPS = 800  # total_num_steps of ds_config.json
EVALUATE_EVERY = 100


# Data #


class Windows(Dataset[Tensor]):
    """Overlap-free windows of ``CONTEXT + 1`` bytes."""

    def __init__(self, text: bytes) -> None:
        count = (len(text) - 1) // CONTEXT
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.bytes[index * CONTEXT : (index + 1) * CONTEXT + 1].long()


def read_text(folder: Path, limit: int) -> tuple[bytes, bytes]:
    """Return training and held-out text: every 20th file is held out."""
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in {".py", ".txt", ".md", ".rst", ".c", ".h", ".cpp"} and "site-packages" not in path.parts
    )
    train, held_out = bytearray(), bytearray()
    for index, path in enumerate(files):
        part = held_out if index % 20 == 10 else train
        if len(part) < limit // (20 if part is held_out else 1):
            part += path.read_bytes().replace(b"    ", b"\t")  # an indentation is one byte to learn, not four
    if len(held_out) <= CONTEXT or len(train) <= CONTEXT:
        raise SystemExit(f"{folder} has too little text: {len(train)} bytes to train on, {len(held_out)} held out")
    return bytes(train), bytes(held_out)


# Model #


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + F.dropout(self.proj(attended.reshape(batch, length, dim)), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class Gpt(nn.Module):
    """Decoder-only language model over bytes; with targets it returns the mean loss, else logits."""

    def __init__(self, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, dim), nn.Embedding(CONTEXT, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, dropout) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256, bias=False)
        for param in self.parameters():
            if param.dim() > 1:
                nn.init.normal_(param, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = with_bytes_before(self.tokens(tokens))
        x = x + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def with_bytes_before(x: Tensor) -> Tensor:
    """Take each quarter of the channels from 0, 1, 2 and 3 bytes before: a byte alone says little."""
    length = x.shape[1]
    parts = [F.pad(part, (0, 0, offset, 0))[:, :length] for offset, part in enumerate(x.chunk(4, dim=-1))]
    return torch.cat(parts, dim=-1)


# Training #


def evaluate(engine: ds_core.Engine, data: Windows, windows: int = 64) -> float:
    """Return the mean loss in nats per byte; the held-out windows are the same on any number of ranks."""
    policy = engine.policy
    batches = (torch.arange(windows) * len(data) // windows).split(8)
    total = torch.zeros((), device=policy.device)
    engine.eval()
    with torch.no_grad():
        for first in range(0, len(batches), policy.num_ranks):
            # at stage 3 every rank takes part in every forward pass, in one beyond the end too
            index = first + policy.rank
            batch = torch.stack([data[window] for window in batches[index % len(batches)].tolist()]).to(policy.device)
            loss = engine(batch[:, :-1], batch[:, 1:])
            total += loss if index < len(batches) else 0
    engine.train()
    if policy.num_ranks > 1:
        dist.all_reduce(total)
    return total.item() / len(batches)


def sample(engine: ds_core.Engine, prompt: str, length: int = 300, temperature: float = 0.7) -> str:
    """Write on from ``prompt``; sharded parameters are gathered on the way, so every rank takes part."""
    engine.eval()
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        for _ in range(length):
            logits = engine(text[:, -CONTEXT:].to(engine.policy.device))[0, -1].cpu() / temperature
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]], dim=1)
    engine.train()
    written = bytes(text[0].tolist()).decode(errors="replace")
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in written).expandtabs(4)


@dataclass
class History:
    """What happened so far; saved with each checkpoint."""

    training: list[list[float]] = field(default_factory=list)  # step, loss of one micro-batch
    held_out: list[list[float]] = field(default_factory=list)  # step, loss
    resumed: list[list[int]] = field(default_factory=list)  # step, number of ranks


def train(
    engine: ds_core.Engine,
    loader: Iterable[Tensor],
    held_out: Windows,
    *,
    history: History,
    stop: int,
    console: Console,
) -> None:
    """Train up to optimizer step ``stop``."""
    device, tokens_per_step = engine.policy.device, engine.policy.train_batch_size * CONTEXT
    columns = [BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn()]
    first, start = engine.global_steps, time.perf_counter()
    with Progress(*columns, console=console, disable=console.quiet) as progress:
        task = progress.add_task("train", total=stop, completed=first, status="")
        for batch in chain.from_iterable(repeat(loader)):  # epoch after epoch
            tokens = batch.to(device)
            loss = engine(tokens[:, :-1], tokens[:, 1:])  # ds: as the model
            engine.backward(loss)  # ds: instead of loss.backward()
            outcome = engine.step()  # ds: instead of optimizer.step(); optimizer.zero_grad()
            if not outcome.boundary:
                continue
            step = engine.global_steps
            history.training.append([step, loss.item()])
            speed = (step - first) * tokens_per_step / (time.perf_counter() - start)
            status = f"loss {loss.item():.3f}  {speed:6,.0f} tokens/s"
            progress.update(task, completed=step, status=status)
            if step % EVALUATE_EVERY == 0 or step == stop:
                paused = time.perf_counter()
                history.held_out.append([step, evaluate(engine, held_out)])
                start += time.perf_counter() - paused
                norm, found = outcome.grad_norm, history.held_out[-1][1]
                console.print(f"step {step:5d}  held out {found:.3f} nats/byte  {status}  norm {norm:.2f}")
            if step == stop:
                return


# Report #


def draw(history: History, path: Path) -> str:
    """Save the loss curve as a picture; return a line that says so."""
    try:
        import matplotlib as mpl
    except ImportError:
        return "matplotlib is not installed: no picture of the loss"
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps, losses = zip(*history.training, strict=True)
    width = max(1, len(steps) // 40)
    smooth = [sum(part := losses[max(0, end - width) : end]) / len(part) for end in range(1, len(losses) + 1)]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="0.85", lw=0.7, label="training, one micro-batch")
    axes.plot(steps, smooth, color="0.5", lw=1.3, label=f"training, mean of {width} steps")
    axes.plot(*zip(*history.held_out, strict=True), "o-", ms=4, color="C0", label="held out")
    for step, num_ranks in history.resumed:
        axes.axvline(step, ls=":", color="C3", label=f"resumed on {processes(num_ranks)}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per byte)", xlim=(0, steps[-1] * 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return f"loss curve: {path}"


def processes(count: int) -> str:
    """Return a number of processes in words."""
    return f"{count} process" if count == 1 else f"{count} processes"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "ds_config.json", help="DeepSpeed JSON file")
    parser.add_argument("--data", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of text")
    parser.add_argument("--out", type=Path, default=Path("out"), help="checkpoints and the loss curve")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of the whole training")
    parser.add_argument("--stop-at", help="save and stop after this step; 'half' for half of --steps")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--max-loss", type=float, help="fail if the held-out loss ends above this")
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    train_text, held_out_text = read_text(options.data, limit=20_000_000)
    torch.manual_seed(0)
    engine, _, loader, _ = ds_core.initialize(  # ds: the model becomes an engine
        Gpt(options.dim, options.layers, options.dim // 64, dropout=0.0),
        config=options.config,
        training_data=Windows(train_text),
    )
    rank, num_ranks = engine.policy.rank, engine.policy.num_ranks
    # text and paths are not markup, and a path is not to be broken
    console = Console(quiet=rank != 0, markup=False, soft_wrap=True, highlight=False)
    num_params = sum(param.numel() for param in engine.module.parameters())
    console.print(f"{num_params:,} parameters, {processes(num_ranks)}, {len(train_text) / 1e6:.1f} MB of text from")
    console.print(f"  {options.data}")
    history = History()
    if options.resume:
        path, state = engine.load_checkpoint(options.out / "checkpoints")  # ds: from any number of processes
        history = History(**state)
        history.resumed.append([engine.global_steps, num_ranks])
        console.print(f"resumed at step {engine.global_steps} from\n  {path}")
    stop = options.steps // 2 if options.stop_at == "half" else int(options.stop_at or options.steps)
    if engine.global_steps < stop:
        train(engine, loader, Windows(held_out_text), history=history, stop=stop, console=console)
        path = engine.save_checkpoint(  # ds: loads on any number of processes, at any stage
            options.out / "checkpoints", client_state=asdict(history)
        )
        console.print(f"saved as\n  {path}")
    if stop == options.steps:
        text = sample(engine, "\tdef __init__(self")
        console.rule("sample")
        console.print(text)
        console.rule()
        if rank == 0:
            console.print(draw(history, options.out / "loss.png"))
    loss = history.held_out[-1][1]
    console.print(f"held-out loss {loss:.3f} nats/byte after {engine.global_steps} steps")
    missed = options.max_loss is not None and not loss <= options.max_loss  # not a number counts as missed
    if missed:
        console.print(f"FAILED: the held-out loss was to be at most {options.max_loss} nats/byte")
    return 1 if missed else 0


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():
        gc.collect()  # the engine held the group: once it is gone, gloo's threads end here and not at exit
        dist.destroy_process_group()
    sys.exit(code)
