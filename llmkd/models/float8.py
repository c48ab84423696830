"""Linear layers in 8-bit floats (e4m3) for a teacher, with a scale for each row of the weight and for each token of the input.

On a GPU `torch._scaled_mm` computes the product, accumulated in float32 and rounded to bfloat16. Elsewhere the same arithmetic runs in
float32, which is slow and serves to measure the accuracy.
"""

import torch
from torch import Tensor, nn

from ..errors import UserError
from .families import decoder_of

FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FLOAT8).max
#: Layers that choose experts are not converted: rounding could choose another expert.
_ROUTERS = ("gate", "router")


def refuse_without_products(device: torch.device, setting: str) -> None:
    """UserError for a GPU that cannot multiply 8-bit floats."""
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < (8, 9):
        raise UserError(
            f"{setting}.quantization.type: found fp8, and {device} has compute capability {has[0]}.{has[1]}, expected 8.9 or more; use int8 or nf4"
        )


def to_float8(x_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as float8 [N, K] and their float32 scales [N, 1]: the largest value of a row becomes the largest float8."""
    scale_N1 = torch.linalg.vector_norm(x_NK, float("inf"), -1, keepdim=True).float().clamp(min=1e-30) / _LARGEST
    return (x_NK / scale_N1).to(FLOAT8, memory_format=torch.contiguous_format), scale_N1


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """`to_float8` of a layer's inputs [..., K]. The result is kept on the tensor, since queries, keys and values read the same one."""
    # Compiled code removes repeated computations itself, and an inference tensor has no version.
    if torch.compiler.is_compiling() or x.is_inference():
        return to_float8(x.reshape(-1, x.shape[-1]))
    version, rounded = getattr(x, "llmkd_float8", (None, None))
    if version != x._version:
        rounded = to_float8(x.reshape(-1, x.shape[-1]))
        x.llmkd_float8 = x._version, rounded
    return rounded


class Float8Linear(nn.Linear):
    """A frozen linear layer [O, K] in float8. `weight` is the dequantised weight, for code that does not call `forward`, such as DoRA."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.held_in = linear.in_features, linear.out_features, linear.weight.dtype
        weight_OK, scale_O1 = to_float8(linear.weight.detach())
        self.weight_OK = nn.Parameter(weight_OK, requires_grad=False)
        self.register_buffer("scale_O1", scale_O1)
        self.bias = linear.bias
        self.requires_grad_(False).train(linear.training)

    @property
    def weight(self) -> Tensor:
        return (self.weight_OK.float() * self.scale_O1).to(self.held_in)

    def forward(self, x: Tensor) -> Tensor:
        x_NK, scale_N1 = _rounded(x)
        product = _product if x.is_cuda else reference
        y_NO = product(x_NK, self.weight_OK, scale_N1, self.scale_O1).to(x.dtype)
        y_NO = y_NO if self.bias is None else y_NO + self.bias
        return y_NO.reshape(*x.shape[:-1], self.out_features)


def _product(x_NK: Tensor, weight_OK: Tensor, scale_N1: Tensor, scale_O1: Tensor) -> Tensor:
    return torch._scaled_mm(x_NK, weight_OK.T, scale_a=scale_N1, scale_b=scale_O1.T, out_dtype=torch.bfloat16)


def reference(x_NK: Tensor, weight_OK: Tensor, scale_N1: Tensor, scale_O1: Tensor) -> Tensor:
    """The GPU's product, [N, O], computed in float32."""
    return (x_NK.float() @ weight_OK.float().T) * scale_N1 * scale_O1.T


def convert(model: nn.Module) -> int:
    """Convert the body's linear layers to float8 in place, and return their number.

    An adapter's own matrices, embeddings, the head, routers and layers whose sizes are not multiples of 16 are left as they are.
    """
    adapters, head = set(getattr(model, "peft_config", ())), {id(m) for m in model.get_output_embeddings().modules()}
    found = [
        (parent, name, layer)
        for path, parent in decoder_of(model).named_modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear and id(layer) not in head and not adapters & {name, *path.split(".")}
        if not {*_ROUTERS} & {name, *path.split(".")} and layer.in_features % 16 == layer.out_features % 16 == 0
    ]
    count = len(found)
    while found:  # popped one by one, so that an old weight is freed before the next layer is converted
        parent, name, layer = found.pop()
        setattr(parent, name, Float8Linear(layer))
    return count
