"""A trained student as one plain model, and how far that is from the model that was trained."""

from pathlib import Path

import torch
from torch import nn

from . import adapters, loading
from .errors import UserError
from .model_files import ModelFiles, tensors


def merge(files: ModelFiles, vocab: int, checkpoint: Path | None = None) -> nn.Module:
    """The unquantised base with the adapter merged into it (in float32, then cast back): a plain transformers model.

    An adapter trained on a quantised base is not merged into that: rounding the sum to 4 bits again would move the
    logits by about a tenth, while the unquantised base differs from the trained model by the errors of quantisation.

    With `checkpoint` the adapter's weights are those of that checkpoint. A tied head is untied where the adapter
    changes the head or the embedding, since one merged tensor could not be both. UserError if the logits moved.
    """
    base = loading.base(files.base, "export")
    if getattr(base, "is_quantized", False):  # as its folder holds it: there is no better one to merge into
        base = base.dequantize()
    kept = base.get_input_embeddings().weight.dtype
    base = base.to(torch.promote_types(kept, torch.float32))
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if module is head or module is embedding}
    touched = any(f".{name}." in key for name in names for key in tensors(files.adapter / "adapter_model.safetensors"))
    if head.weight is embedding.weight and touched:
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    adapted = adapters.load(base, files, "export").eval()
    if checkpoint:
        put(adapted, checkpoint)
    ids_BT = torch.arange(24).reshape(2, 12) * 7 % vocab
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT, use_cache=False).logits
        merged = adapted.merge_and_unload()
        gap = (merged(input_ids=ids_BT, use_cache=False).logits - expected).abs().max().item()
    if not gap <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise UserError(f"export: merging {files.adapter} moved its logits by {gap:.2g}; use the adapter unmerged")
    return merged.to(kept)


def restored(model_folder: Path, checkpoint: Path) -> nn.Module:
    """A fully trained model as it was at a checkpoint."""
    model = loading.base(model_folder, "export")
    put(model, checkpoint)
    return model


def put(model: nn.Module, checkpoint: Path) -> None:
    """Give a model the trained weights of a checkpoint."""
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    weights = load_file(checkpoint / "student.safetensors")
    if not weights.keys() <= parameters.keys():
        raise UserError(f"export: {checkpoint} holds weights that this model does not have")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
