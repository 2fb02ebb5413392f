"""Train a byte-level GPT on source code, on as many processes as you like.

    ds run --nproc 2 examples/train_lm.py                     # trains on Python's own standard library
    ds run --nproc 2 examples/train_lm.py --data DIR          # on any folder of text
    ds run --nproc 1 examples/train_lm.py --resume            # goes on from the last checkpoint, on another number

The configuration is a DeepSpeed JSON file; the only lines that belong to ds are marked with "ds:".
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
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
            part += path.read_bytes()
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
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float()
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


# Training #


def evaluate(engine: ds_core.Engine, data: Windows, rank: int, num_ranks: int, batches: int = 8) -> float:
    """Return the mean loss in nats per byte over held-out windows, each rank computing its share."""
    engine.eval()
    stride = max(1, len(data) // (8 * batches * num_ranks))
    total = torch.zeros(1)
    with torch.no_grad():
        for index in range(batches):
            first = (index * num_ranks + rank) * 8
            batch = torch.stack([data[(first + item) * stride % len(data)] for item in range(8)])
            total += engine(batch[:, :-1], batch[:, 1:]).item() / batches
    if num_ranks > 1:
        dist.all_reduce(total)
    engine.train()
    return total.item() / num_ranks


def sample(engine: ds_core.Engine, prompt: str, length: int = 200, temperature: float = 0.7) -> str:
    """Write on from ``prompt``; sharded parameters are gathered on the way, so every rank takes part."""
    engine.eval()
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        for _ in range(length):
            logits = engine(text[:, -CONTEXT:])[0, -1] / temperature
            text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)[None]], dim=1)
    engine.train()
    return bytes(text[0].tolist()).decode(errors="replace")


def draw(history: list[list[float]], validation: list[list[float]], resumed_at: list[int], path: Path) -> None:
    """Save the loss curve as a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*history, strict=True), color="0.75", lw=1, label="training (one micro-batch)")
    axes.plot(*zip(*validation, strict=True), "o-", ms=4, color="C0", label="held out")
    for step in resumed_at:
        axes.axvline(step, ls=":", color="C3", label="resumed on another number of processes")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per byte)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=HERE / "ds_config.json", help="DeepSpeed JSON file")
    parser.add_argument("--data", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="folder of text")
    parser.add_argument("--out", type=Path, default=Path("out"), help="checkpoints and the loss curve")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of the whole training")
    parser.add_argument("--stop-at", type=int, help="save and stop after this step")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    options = parser.parse_args()

    train_text, held_out_text = read_text(options.data, limit=20_000_000)
    torch.manual_seed(0)
    engine, _, loader, schedule = ds_core.initialize(  # ds: the model becomes an engine
        Gpt(options.dim, options.layers, options.dim // 64, dropout=0.0),
        config=options.config,
        training_data=Windows(train_text),
    )
    rank, num_ranks = engine.policy.rank, engine.policy.num_ranks
    held_out = Windows(held_out_text)
    history: list[list[float]] = []
    validation: list[list[float]] = []
    resumed_at: list[int] = []
    if options.resume:
        path, state = engine.load_checkpoint(options.out / "checkpoints")  # ds: from any number of processes
        history, validation = state["history"], state["validation"]
        resumed_at = [*state["resumed_at"], engine.global_steps]
    console = Console(quiet=rank != 0)
    console.print(
        f"[bold]{sum(p.numel() for p in engine.module.parameters()):,}[/] parameters, {num_ranks} processes, "
        f"{len(train_text) / 1e6:.1f} MB of text from {options.data}"
        + (f", resumed at step {engine.global_steps} from {path}" if options.resume else "")
    )
    columns = [
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
    ]  # fmt: skip
    stop = min(options.steps, options.stop_at or options.steps)
    tokens_per_step = engine.policy.train_batch_size * CONTEXT
    with Progress(*columns, console=console, disable=rank != 0) as progress:
        task = progress.add_task("train", total=options.steps, completed=engine.global_steps, status="")
        start, first = time.perf_counter(), engine.global_steps
        while engine.global_steps < stop:
            for batch in loader:
                loss = engine(batch[:, :-1], batch[:, 1:])  # ds: as the model
                engine.backward(loss)  # ds: instead of loss.backward()
                outcome = engine.step()  # ds: instead of optimizer.step(); optimizer.zero_grad()
                if not outcome.boundary:
                    continue
                step = engine.global_steps
                speed = (step - first) * tokens_per_step / (time.perf_counter() - start)
                history.append([step, loss.item()])
                progress.update(task, completed=step, status=f"loss {history[-1][1]:.3f}  {speed:,.0f} tokens/s")
                if step % max(1, options.steps // 10) == 0 or step == stop:
                    validation.append([step, evaluate(engine, held_out, rank, num_ranks)])
                    lr = schedule.get_last_lr()[0] if schedule else math.nan
                    progress.console.print(
                        f"step {step:4d}   loss {history[-1][1]:.3f}   held out {validation[-1][1]:.3f} nats/byte   "
                        f"grad norm {outcome.grad_norm:.2f}   lr {lr:.1e}   {speed:,.0f} tokens/s"
                    )
                if step == stop:
                    break
    path = engine.save_checkpoint(  # ds: loads on any number of processes, at any stage
        options.out / "checkpoints",
        client_state={"history": history, "validation": validation, "resumed_at": resumed_at},
    )
    console.print(f"saved {path}")
    if stop == options.steps:
        text = sample(engine, "def ")
        console.print("\n[bold]sample[/]", text, sep="\n", markup=True, highlight=False)
        if rank == 0:
            draw(history, validation, resumed_at, options.out / "loss.png")
        console.print(
            f"\nheld-out loss [bold]{validation[-1][1]:.3f}[/] nats/byte; curve in {options.out / 'loss.png'}"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
