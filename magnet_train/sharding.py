"""FSDP2: each rank holds a part of every weight, and the whole of a block only while it computes
with it.

A pass through sharded weights is a collective: all ranks must make it, as often as each other.
Training does; validation, whose batches are not as many on every rank, and decoding run on a whole
copy (`unsharded_copy`).

Everything here holds for plain weights too: they are their own only part.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from magnet_train.common.errors import UserError
from magnet_train.model import Magnet


def shard(network: Magnet, device_type: str) -> None:
    """Deal out the weights to all ranks, in place; names stay as they are, and so do the numbers
    but for the order of sums over ranks.

    Weights travel in the precision in which they are stored, and autocast rounds them where it does
    without shards: so a mixed precision is the same as under DDP, float32 positions and norms
    included.

    Args:
        network: the same on every rank, compiled or not.
        device_type: of the ranks' devices, "cuda" or "cpu".

    Raises:
        UserError: if the ranks' weights are not the same, which DDP would make so and shards would
        mix.
    """
    ranks = dist.get_world_size()
    # Of the bits, as integers: exact, whatever the number of threads.
    sums = [
        weight.detach().view(torch.int16).sum(dtype=torch.int64).item()
        for weight in network.parameters()
    ]
    of_all: list[Any] = [None] * ranks
    dist.all_gather_object(of_all, sums)
    if any(other != sums for other in of_all):
        raise UserError(
            "the ranks begin with different weights: did --model.init_from name the folder of a "
            "run that goes on, or "
            "do unlike CPUs draw them differently? Give --model.init_from a checkpoint file"
        )

    def place(weight: nn.Parameter) -> Shard | None:
        """Of stages' tables and heads, `k n d`, each rank has a slice of each: there may be fewer
        stages than ranks."""
        return Shard(2) if weight.dim() == 3 and weight.shape[2] % ranks == 0 else None

    mesh = init_device_mesh(device_type, (ranks,))
    # The text's keys and values of all blocks are made before the first block: their weights come
    # and go together.
    fully_shard([block.cross_attention.kv for block in network.blocks], mesh=mesh)
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, shard_placement_fn=place)
    register_fsdp_forward_method(network, "masked_logits")


def check_shardable(precision: str, optimizer: str) -> None:
    """Whether a run works with sharded weights.

    Args:
        precision: Lightning's name.
        optimizer: name in an OptimizerConfig.

    Raises:
        UserError: if it does not.
    """
    if precision not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise UserError(
            f"precision={precision}: with sharded weights give --trainer.precision bf16-mixed, or "
            "32"
        )
    if optimizer == "dadapt_adam":
        raise UserError(
            "optimizer name=dadapt_adam: its step size is a sum over all weights, which are "
            "sharded here; use "
            "--model.optimizer.name adamw --model.optimizer.lr 1e-4, or --trainer.strategy ddp"
        )


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def local_shard(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this rank, as a plain tensor that shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank; a collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_rank0(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as a checkpoint holds them: sharded ones whole, on the CPU, and on the first rank
    alone; a collective.

    One after another, so that a device never has more than one of them.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            found[name] = tensor
        elif dist.get_rank() == 0:
            found[name] = tensor.full_tensor().cpu()
        else:
            tensor.full_tensor()
    return found


@torch.no_grad()
def unsharded_copy(network: Magnet) -> Magnet:
    """A plain network of the same weights, whole on every rank and beside the shards; a
    collective."""
    with torch.device("meta"):
        copy = Magnet(network.config)
    copy.text_multiple = network.text_multiple
    copy.load_state_dict(
        {name: full_tensor(weight) for name, weight in network.state_dict().items()}, assign=True
    )
    return copy.train(network.training)
