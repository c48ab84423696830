"""Sharded tensors (torch's DTensor), of which each process holds a part. For any other tensor these functions return the tensor itself."""

from torch import Tensor


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is sharded."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. A collective: every process must call it."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part."""
    return tensor.to_local() if is_part(tensor) else tensor


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded like `like` if the shapes are equal, and on its device."""
    value = value.to(like.device)
    if not is_part(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
