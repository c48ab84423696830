"""Linear layers in 4 and 8 bit like those of bitsandbytes, for fake tensors, on which its kernels do not run: their bytes follow formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..config.recipe import Quantization
from ..models.families import decoder_of

_BLOCK = 64  # weights that share a scale, in 4 bit


def bytes_of(weights: int, rows: int, settings: Quantization) -> int:
    """Bytes of a matrix with so many weights and rows, scales included.

    4 bit (Dettmers et al. 2023, arXiv:2305.14314, section 3): half a byte per weight, and for every 64 weights a float32, or with double
    quantisation a byte and for every 256 of those bytes a float32. int8: a byte per weight, and a float32 per row.
    """
    if settings.type == "int8":
        return weights + 4 * rows
    blocks = -(-weights // _BLOCK)
    return -(-weights // 2) + (blocks + 4 * -(-blocks // 256) if settings.double_quant else 4 * blocks)


class QuantizedLinear(nn.Linear):
    """A frozen linear layer [O, K], whose weight is dequantised for every product, also in the backward pass."""

    def __init__(self, linear: nn.Linear, settings: Quantization):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        size, device = bytes_of(linear.weight.numel(), linear.out_features, settings), linear.weight.device
        weights = -(-linear.weight.numel() // (1 if settings.type == "int8" else 2))
        self.held = nn.Parameter(torch.empty(weights, dtype=torch.uint8, device=device), requires_grad=False)
        scales = torch.empty(size - weights, dtype=torch.uint8, device=device)
        self.register_buffer("scales", scales)  # not sharded, like those of bitsandbytes
        self.bias, self.rounds = linear.bias, settings.type == "int8"
        self.requires_grad_(False).train(linear.training)

    @property
    def weight(self) -> Tensor:
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.held.device)

    def forward(self, x: Tensor) -> Tensor:
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias


def share_scales(models: Sequence[nn.Module]) -> None:
    """Let layers that share a quantised weight also share its scales."""
    first: dict[int, QuantizedLinear] = {}
    for model in models:
        for layer in model.modules():
            if isinstance(layer, QuantizedLinear):
                layer.scales = first.setdefault(layer.held.untyped_storage()._cdata, layer).scales


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        rows = x.reshape(-1, layer.in_features)
        if layer.rounds:  # LLM.int8: activations are rounded, too, and the product has 32 bits before it is scaled
            torch.empty_like(rows, dtype=torch.int8)
            weight_OK = torch.empty(1, 1, dtype=torch.float32, device=x.device).expand(layer.out_features, layer.in_features)
            whole = rows.new_empty(1, 1, dtype=torch.float32).expand(rows.shape) @ weight_OK.T
            return whole.to(x.dtype).reshape(*x.shape[:-1], -1)
        return (rows.to(layer.dtype) @ layer.weight.T).to(x.dtype).reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return (grad.to(ctx.layer.dtype) @ ctx.layer.weight).to(grad.dtype), None


def quantize(model: nn.Module, settings: Quantization) -> None:
    """Replace the body's linear layers, in place; embeddings, norms and the head stay as they are."""
    head = model.get_output_embeddings()
    for parent in list(decoder_of(model).modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer is not head:
                setattr(parent, name, QuantizedLinear(layer, settings))
    if settings.type == "int8":
        model.is_loaded_in_8bit = True
