"""GPUs by name: their memory and the rates of their matrix products, as their makers state them, and what a run gets of both. No torch here."""

import re
from dataclasses import dataclass

#: The share of a GPU's peak that a training step reaches: a plain assumption, which --share replaces.
SHARE = 0.4
#: Bytes that CUDA takes for itself before the first tensor (its context, cuBLAS): between 0.4 and 0.7 GB on these GPUs.
CONTEXT = 0.6e9
#: What the allocator holds in addition, as a share of what is allocated apart from weights: freed blocks do not fit new tensors.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Device:
    """memory   bytes
    half     operations per second of dense products in bfloat16, summed in float32
    single   of products in float32, without TF32
    link     bytes a second to another GPU of the machine, in one direction: NVLink, or PCIe 4
    bandwidth   bytes a second from its memory; None where it is not known
    measured   whether the rates were measured here, and not stated
    """

    name: str
    memory: float
    half: float
    single: float
    link: float = 32e9
    bandwidth: float | None = None
    measured: bool = False

    def rate(self, dtype: str) -> float:
        """Operations per second of products in that type."""
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
    """Bytes of 24GB, 24 (GB), 22.5GiB or 900MB. ValueError for anything else, and for none."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GB|GiB|MB|MiB|G)?\s*", text, re.IGNORECASE)
    unit = {"gb": 1e9, "g": 1e9, "": 1e9, "gib": 2**30, "mb": 1e6, "mib": 2**20}
    if not found or not float(found[1]):
        raise ValueError(f"found {text}, expected an amount of memory, such as 24GB")
    return float(found[1]) * unit[(found[2] or "").lower()]


def held_on_gpu(peak: float, weights: float) -> float:
    """Bytes that a GPU must have for that peak of allocated memory, of which `weights` never move."""
    return peak + FRAGMENTATION * (peak - weights) + CONTEXT
