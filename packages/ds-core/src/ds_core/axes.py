"""The axes of a mesh of ranks: who is in one pipeline, and who shares the data of one stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

PIPE, DATA = "pipe", "data"


class Axes(NamedTuple):
    """This rank's place on the mesh."""

    mesh: DeviceMesh | None  # None: one process, or one axis
    pipe: dist.ProcessGroup | None  # the ranks of its pipeline, in the order of the stages
    data: dist.ProcessGroup | None  # the ranks with the same stages
    pipe_rank: int = 0
    num_pipe_ranks: int = 1
    data_rank: int = 0
    num_data_ranks: int = 1


def data_axis(group: dist.ProcessGroup | None) -> Axes:
    """Return the place of this rank where all ranks share the data."""
    if group is None:
        return Axes(None, None, None)
    return Axes(None, None, group, data_rank=dist.get_rank(group), num_data_ranks=dist.get_world_size(group))


def make_axes(group: dist.ProcessGroup | None, num_pipe_ranks: int, device_type: str) -> Axes:
    """Arrange the ranks of ``group``: neighbours share data, so that gradients stay within a node as far as they can.

    Rank ``p * d + i`` of p * d is rank ``p`` of pipeline ``i``. All ranks call it.

    Raises:
        ValueError: The ranks are no whole number of pipelines, or not all there are.
    """
    size = 1 if group is None else dist.get_world_size(group)
    if size % num_pipe_ranks:
        raise ValueError(
            f"a pipeline of {num_pipe_ranks} ranks: {size} ranks are no whole number of pipelines; start a multiple of "
            f"{num_pipe_ranks}, or cut the model into fewer parts (num_stages, or pipeline.stages)"
        )
    if group is None:
        return Axes(None, None, None)
    if size != dist.get_world_size():
        # torch names new groups by a count that only those who make them go on with
        raise ValueError(
            f"a model in stages needs all {dist.get_world_size()} ranks, got a group of {size}: leave group=None, or "
            "start the pipeline by itself"
        )
    num_data_ranks = size // num_pipe_ranks
    ranks = torch.tensor(dist.get_process_group_ranks(group)).view(num_pipe_ranks, num_data_ranks)
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=(PIPE, DATA))
    return Axes(
        mesh,
        mesh.get_group(PIPE),
        mesh.get_group(DATA),
        mesh.get_local_rank(PIPE),
        num_pipe_ranks,
        mesh.get_local_rank(DATA),
        num_data_ranks,
    )
