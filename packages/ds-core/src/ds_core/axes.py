"""The axes of a mesh of ranks: who is in one pipeline, who shares the data of one stage, and who a layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

PIPE, DATA, TENSOR = "pipe", "data", "tensor"


class Axes(NamedTuple):
    """This rank's place on the mesh."""

    mesh: DeviceMesh | None  # None: one process, or one axis
    pipe: dist.ProcessGroup | None  # the ranks of its pipeline, in the order of the stages
    data: dist.ProcessGroup | None  # the ranks with the same stages
    pipe_rank: int = 0
    num_pipe_ranks: int = 1
    data_rank: int = 0
    num_data_ranks: int = 1
    tensor: dist.ProcessGroup | None = None  # the ranks with the same data and stages, which split layers
    tensor_rank: int = 0
    num_tensor_ranks: int = 1


def data_axis(group: dist.ProcessGroup | None) -> Axes:
    """Return the place of this rank where all ranks share the data."""
    if group is None:
        return Axes(None, None, None)
    return Axes(None, None, group, data_rank=dist.get_rank(group), num_data_ranks=dist.get_world_size(group))


def make_axes(
    group: dist.ProcessGroup | None, num_pipe_ranks: int, device_type: str, num_tensor_ranks: int = 1
) -> Axes:
    """Arrange the ranks of ``group``: those that talk most are neighbours, so that messages stay within a node.

    Neighbours split layers, and their neighbours share data: rank ``(p * D + d) * T + t`` of P * D * T is tensor rank
    ``t`` of rank ``p`` of the pipeline for data ``d``. All ranks call it.

    Raises:
        ValueError: The ranks are no whole number of pipelines, or of models, or not all there are.
    """
    size = 1 if group is None else dist.get_world_size(group)
    if size % (num_pipe_ranks * num_tensor_ranks) and num_tensor_ranks > 1:
        each = num_pipe_ranks * num_tensor_ranks
        raise ValueError(
            f"a model over {each} ranks ({num_pipe_ranks} stages, each layer split over {num_tensor_ranks}): {size} "
            f"ranks are no multiple of that; start a multiple of {each}, or change tensor_parallel.autotp_size"
        )
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
            f"a model in stages, or with split layers, needs all {dist.get_world_size()} ranks, got a group of "
            f"{size}: leave group=None, or start it by itself"
        )
    num_data_ranks = size // (num_pipe_ranks * num_tensor_ranks)
    ranks = torch.tensor(dist.get_process_group_ranks(group)).view(num_pipe_ranks, num_data_ranks, num_tensor_ranks)
    if num_tensor_ranks == 1:
        mesh = DeviceMesh(device_type, ranks[..., 0], mesh_dim_names=(PIPE, DATA))
    else:
        mesh = DeviceMesh(device_type, ranks, mesh_dim_names=(PIPE, DATA, TENSOR))
    axes = Axes(
        mesh,
        mesh.get_group(PIPE),
        mesh.get_group(DATA),
        mesh.get_local_rank(PIPE),
        num_pipe_ranks,
        mesh.get_local_rank(DATA),
        num_data_ranks,
    )
    if num_tensor_ranks == 1:
        return axes
    return axes._replace(
        tensor=mesh.get_group(TENSOR), tensor_rank=mesh.get_local_rank(TENSOR), num_tensor_ranks=num_tensor_ranks
    )
