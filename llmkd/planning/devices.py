"""GPUs by name: their memory and rates of matrix products by the makers' data sheets, and the share of both that a run can use. No torch here."""

import re
from dataclasses import dataclass

#: The share of a GPU's peak rate that a training step reaches: an assumption, which --share replaces.
SHARE = 0.4
#: Bytes that CUDA uses before the first tensor (its context, cuBLAS): between 0.4 and 0.7 GB on these GPUs.
CONTEXT = 0.6e9
#: Memory that the allocator holds in addition, as a share of allocated memory other than weights: freed blocks do not fit new tensors.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Device:
    """A device.

    memory      bytes
    half        operations per second of dense products in bfloat16, summed in float32
    single      operations per second of products in float32, without TF32
    link        bytes per second to another GPU of the machine, in one direction: NVLink, or PCIe 4
    bandwidth   bytes per second from its memory; None if unknown
    measured    whether the rates were measured here; if not, they are the maker's
    """

    name: str
    memory: float
    half: float
    single: float
    link: float = 32e9
    bandwidth: float | None = None
    measured: bool = False

    def rate(self, dtype: str) -> float:
        """Operations per second of products in that dtype."""
        return self.half if dtype in ("bfloat16", "float16") else self.single


#: The makers' data sheets: dense, without sparsity.
GPUS = {
    one.name.lower(): one
    for one in (
        Device("L4", 24e9, 121e12, 30.3e12, bandwidth=300e9),
        Device("4090", 24e9, 165.2e12, 82.6e12, bandwidth=1008e9),
        Device("A100-40GB", 40e9, 312e12, 19.5e12, 300e9, 1555e9),
        Device("A100", 80e9, 312e12, 19.5e12, 300e9, 2039e9),
        Device("H100", 80e9, 989e12, 67e12, 450e9, 3.35e12),
        Device("H200", 141e9, 989e12, 67e12, 450e9, 4.8e12),
    )
}


def bytes_in(text: str) -> float:
    """The bytes that a text such as 24GB, 24 (GB), 22.5GiB or 900MB means. ValueError for any other text, and for 0."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB|MB|MiB|G)?\s*", text, re.IGNORECASE)
    unit = {"gb": 1e9, "g": 1e9, "": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}
    if not found or not float(found[1]):
        raise ValueError(f"found {text}, expected an amount of memory, such as 24GB")
    return float(found[1]) * unit[(found[2] or "").lower()]


def held_on_gpu(peak: float, weights: float) -> float:
    """The bytes that a GPU must have for a peak of allocated memory, of which `weights` stay allocated throughout."""
    return peak + FRAGMENTATION * (peak - weights) + CONTEXT
