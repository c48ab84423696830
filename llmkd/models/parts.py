"""Sharded tensors (torch's DTensor), of which each process holds a part. Of any other tensor its whole and its part are itself."""

from torch import Tensor


def is_part(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it. A collective: every process must ask."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if is_part(tensor) else tensor


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the part that this process has of `like`, where the two have one shape; on its device."""
    value = value.to(like.device)
    if not is_part(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
