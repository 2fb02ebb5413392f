"""Ranks as threads of one process: numerics at many ranks, without starting any process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)


def on_threads(size: int, function: Callable[[int], Any]) -> list[Any]:
    """Call ``function(rank)`` on ``size`` threads that form a world; return what each returned."""
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    store = dist.HashStore()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            # on a GPU all backward passes would share one thread of autograd's, and wait for each other in it
            with torch.autograd.set_multithreading_enabled(False):
                results[rank] = function(rank)
        except BaseException as error:  # wakes the other ranks, and is raised again below
            ProcessLocalGroup.exception_handle(error)
            errors.append(error)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        raise errors[0]
    return results
