"""Turns a trained student into a plain transformers model: merges its adapter, or loads the weights of a checkpoint."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..errors import UserError, brief
from ..model_folder.files import ModelFiles
from . import adapters, pretrained
from .probe import largest_difference, probe_ids


def merge(files: ModelFiles, vocab: int, checkpoint: Path | None = None, trained_in: str | None = None) -> nn.Module:
    """The base with the adapter merged into it, computed in at least float32 and stored in the base's dtype: a plain transformers model.

    An adapter that was trained on a quantised base is merged into the unquantised one. The result differs from the trained model by the
    quantisation error; rounding the sum to 4 bits again would change the logits by about a tenth. A tied head stays tied, unless the adapter
    changes head and embedding differently. UserError if merging changes the logits.

    checkpoint   the checkpoint from which the adapter's weights come; None: from its own folder
    trained_in   the dtype in which the student was trained: the base is rounded to it as in training, and the sum stays in at least float32,
                 which is the trained student up to its arithmetic
    """
    base = pretrained.load_pretrained(files.base, "export", trained_in or "auto")
    if getattr(base, "is_quantized", False):  # the folder has only quantised weights
        base = base.dequantize()
        # Oddity: a private attribute of transformers. With it, saving would convert the weights back as if they were quantised.
        base._weight_conversions = None
    held = {name: t.dtype for name, t in _tensors(base)}
    base = base.to(torch.promote_types(base.get_input_embeddings().weight.dtype, torch.float32))
    adapted = adapters.load(base, files, "export").eval()
    if checkpoint:
        load_trained_weights(adapted, checkpoint)
    ids_BT = probe_ids(vocab)
    with torch.no_grad():
        expected = adapted(input_ids=ids_BT, use_cache=False).logits
        merged = merge_adapter_(adapted, f"export: {files.adapter}")
        gap = largest_difference(merged(input_ids=ids_BT, use_cache=False).logits, expected)
    if not gap <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise UserError(f"export: merging {files.adapter} changes its logits by {gap:.2g}; use the adapter unmerged")
    if trained_in:
        return merged
    for name, t in _tensors(merged):  # one by one: some have a wider dtype than the rest, such as the bias of a router
        t.data = t.data.to(held[name])
    return merged


def merge_classifier(files: ModelFiles, auto: str, checkpoint: Path | None = None) -> nn.Module:
    """A classifier's base with its trained head and the adapter merged into it, computed in at least float32 and stored in the base's dtype."""
    base = pretrained.load_pretrained(files.base, "export", auto=auto)
    held = {name: t.dtype for name, t in _tensors(base)}
    adapted = adapters.load(base.to(torch.promote_types(base.dtype, torch.float32)), files, "export").eval()
    if checkpoint:
        load_trained_weights(adapted, checkpoint)
    merged = adapted.merge_and_unload()
    for name, t in _tensors(merged):
        t.data = t.data.to(held[name])
    return merged


def merge_adapter_(adapted: nn.Module, which: str) -> nn.Module:
    """Merge the adapter into the weights in place, layer by layer in at least float32, and return the plain model in its own dtypes.

    which  the setting and the adapter, for messages
    """
    if any(getattr(config, "layer_replication", None) for config in adapted.peft_config.values()):
        raise UserError(f"{which} cannot be merged: its layer_replication gives several layers one base weight; use the adapter unmerged")
    base = adapted.get_base_model()
    tied = _untied(base)
    for layer in adapted.modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "merge"):
            # Oddity: the method is replaced on the object, since merge_and_unload calls it and has no option for the dtype.
            layer.merge = functools.partial(_merge_wide, layer, layer.merge)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no longer tied after merging")  # tied again below if they are equal
            merged = adapted.merge_and_unload()
    except Exception as error:
        raise UserError(f"{which} cannot be merged ({brief(error)}); use the adapter unmerged") from error
    head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
    if tied and torch.equal(head.weight, embedding.weight):
        head.weight, base.config.tie_word_embeddings = embedding.weight, True
    return merged


def _merge_wide(layer: nn.Module, merge: Callable, *which, **how) -> None:
    """PEFT's `merge` of a layer, in at least float32: in 16 bit, PEFT rounds the update of some layers, such as experts, before adding it."""
    del layer.merge
    held = {name: t.dtype for name, t in _tensors(layer)}
    layer.to(functools.reduce(torch.promote_types, held.values(), torch.float32))
    merge(*which, **how)
    for name, t in _tensors(layer):
        t.data = t.data.to(held.get(name, t.dtype))


def _untied(base: nn.Module) -> bool:
    """Give a tied head its own weight, below an adapter on it. True if it was tied."""
    shared = {id(p) for p in base.get_input_embeddings().parameters()}
    owned = [
        (module, name) for module in base.get_output_embeddings().modules() for name, p in module._parameters.items() if id(p) in shared
    ]
    for module, name in owned:
        setattr(module, name, nn.Parameter(getattr(module, name).detach().clone(), requires_grad=False))
    return bool(owned)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def from_checkpoint(model_folder: Path, checkpoint: Path, auto: str = pretrained.CAUSAL_LM) -> nn.Module:
    """A model of `student.method: full` with the weights of a checkpoint. `auto`: the name of the transformers class that loads it."""
    model = pretrained.load_pretrained(model_folder, "export", auto=auto)
    load_trained_weights(model, checkpoint)
    return model


def verify_saved(model: nn.Module, folder: Path, auto: str = pretrained.CAUSAL_LM) -> None:
    """UserError unless the model in `folder` has the same bits as `model`, which was saved there."""
    again, saved = pretrained.load_pretrained(folder, "export", auto=auto).state_dict(), model.state_dict()
    wrong = [k for k in saved if k not in again or not torch.equal(again[k].double(), saved[k].cpu().double())]
    if wrong or again.keys() - saved.keys():
        raise UserError(f"export: {len(wrong)} tensors, such as {wrong[:1]}, were changed by saving; use the adapter unmerged")


def load_trained_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load the trained weights of a checkpoint into a model in place, without those of loss terms and of an averaged teacher."""
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    weights = {
        name: value for name, value in load_file(checkpoint / "student.safetensors").items() if not name.startswith(("terms.", "teacher."))
    }
    if not weights.keys() <= parameters.keys():
        raise UserError(f"export: {checkpoint} holds weights that this model does not have; export it with the run's own recipe and base")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
