"""FSDP2: each rank has a shard of every weight, and gathers a block only while it computes it.

A forward pass with sharded weights is a collective, so every rank must run equally many. Validation
has different numbers of batches per rank, so it uses an unsharded copy, as does decoding.

All functions also accept plain tensors.
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
    """Shard the weights over all ranks, in place.

    Parameter names do not change, and results differ only by the order of sums over ranks. Weights
    are gathered in their stored precision and then rounded by autocast, so mixed precision is the
    same as under DDP, with positions and norms in float32.

    Args:
        network: The same on every rank, compiled or not.
        device_type: Type of the ranks' devices, "cuda" or "cpu".

    Raises:
        UserError: if the ranks have different weights, because sharding does not broadcast.
    """
    ranks = dist.get_world_size()
    # Integer sums of the bits are exact with any number of threads.
    sums = [
        weight.detach().view(torch.int16).sum(dtype=torch.int64).item()
        for weight in network.parameters()
    ]
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, sums)
    if any(other != sums for other in gathered):
        raise UserError(
            "the ranks start with different weights: does --model.init_from name the folder of a "
            "running run, or do different CPUs draw them differently? Give --model.init_from a "
            "checkpoint file"
        )

    def place(weight: nn.Parameter) -> Shard | None:
        """Shard by the last axis where the first may be below the number of ranks: embeddings and
        heads `k n d`, and convolutions `kernel d`.
        """
        is_short = weight.dim() == 3 or (weight.dim() == 2 and weight.shape[0] % ranks > 0)
        return Shard(weight.dim() - 1) if is_short and weight.shape[-1] % ranks == 0 else None

    mesh = init_device_mesh(device_type, (ranks,))
    # The text's keys and values of all blocks are computed before the first block, so their weights
    # form one group.
    fully_shard([block.cross_attention.kv for block in network.blocks], mesh=mesh)
    for block in network.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(network, mesh=mesh, shard_placement_fn=place)
    register_fsdp_forward_method(network, "masked_logits")


def check_shardable(precision: str, lora_rank: int, saves_folders: bool) -> None:
    """Check that a run works with sharded weights.

    Args:
        precision: Lightning's name.
        lora_rank: rank of the adapters; 0 = none.
        saves_folders: whether the strategy writes a checkpoint as a folder of shards.

    Raises:
        UserError: if it does not.
    """
    if precision not in ("32-true", "32", "bf16-mixed", "bf16"):
        raise UserError(
            f"precision={precision}: with sharded weights give --trainer.precision bf16-mixed, or "
            "32"
        )
    if lora_rank:
        raise UserError(
            f"--lora.rank {lora_rank}: not with sharded weights; use --trainer.strategy ddp"
        )
    if saves_folders:
        raise UserError(
            "ModelParallelStrategy: save_distributed_checkpoint=true writes folders, which are not "
            "supported; set it to false, or use --trainer.strategy fsdp2"
        )


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


def local_shard(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, as a plain tensor with the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The unsharded tensor on every rank. Collective if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_rank0(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors for a checkpoint on the CPU of rank 0. Collective.

    Tensors are gathered one at a time, so that a device has only one of them unsharded.
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
    """An unsharded copy of the network on every rank. Collective."""
    with torch.device("meta"):
        copy = Magnet(network.config)
    copy.text_multiple = network.text_multiple
    copy.load_state_dict(
        {name: full_tensor(weight) for name, weight in network.state_dict().items()}, assign=True
    )
    return copy.train(network.training)
