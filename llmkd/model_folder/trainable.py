"""Models that cannot be trained in full (student.method: full). No torch."""

from ..errors import UserError
from .files import ModelFiles


def refuse_untrainable(files: ModelFiles | None, quantised: bool, dtype: str) -> None:
    """UserError for an adapter, for `quantised` weights, and for float16. `dtype`: the type of the weights in memory."""
    if files and files.adapter:
        raise UserError(
            f"student.method: found full, and {files.adapter} is an adapter; merge it first (llmkd export), or use method: lora"
        )
    if files and quantised:
        raise UserError(f"student.method: found full, and {files.base} is quantised; quantised weights cannot be trained, use method: lora")
    if dtype == "float16":
        raise UserError("student.dtype: float16 weights cannot be trained in full; set float32, with mixed_precision: bf16 for speed")
