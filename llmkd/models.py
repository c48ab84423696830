"""Base models, adapters and their heads: loading, checking, saving, merging."""

import json
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from .console import say
from .errors import UserError
from .head import Head
from .model_files import RECORD, ModelFiles, find, fingerprint, tensors
from .recipe import Student as StudentSettings
from .recipe import Teacher as TeacherSettings
from .signals import View

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class LanguageModel(nn.Module):
    """A causal language model, with or without an adapter, parted into its body (`hidden`) and its `head`.

    `autocast` is the type in which the body's products are computed, where that is not the weights' own.
    """

    def __init__(self, model: nn.Module, vocab: int):
        super().__init__()
        self.model = model
        self.autocast: torch.dtype | None = None
        self.head = head_of(self.plain, vocab)

    @property
    def plain(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it but without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def hidden(self, view: View) -> Tensor:
        """Last hidden states [N, H] at the view's rows."""
        with torch.autocast(view.rows_N.device.type, self.autocast, enabled=self.autocast is not None):
            hidden_BTH = self.plain.get_decoder()(**view.inputs, use_cache=False)[0]
        return hidden_BTH.flatten(0, 1).index_select(0, view.rows_N)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def head_of(model: nn.Module, vocab: int) -> Head:
    """The model's head, with what its family does between hidden state and logits."""
    config = model.config.get_text_config()
    scale = 1.0
    if config.model_type.startswith("granite"):
        scale = 1 / config.logits_scaling
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= getattr(config, name, None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(model.get_output_embeddings(), vocab, scale, softcap)


def check_head(language_model: LanguageModel, setting: str) -> None:
    """Compare `head.logits` with the model's own on a few tokens. UserError where they differ."""
    model, vocab = language_model.plain, language_model.head.vocab
    device = next(model.parameters()).device
    ids_BT = torch.arange(24, device=device).reshape(2, 12) * 7 % vocab
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            own_NV = model(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)[:, :vocab]
            rows = torch.arange(24, device=device)
            ours_NV = language_model.head.logits(language_model.hidden(View({"input_ids": ids_BT}, rows)))
    except Exception as error:
        raise UserError(f"{setting}: {model.config.model_type} fails on a first small batch ({_brief(error)})") from error
    model.train(was_training)
    rounding = {torch.float64: 1e-9, torch.float32: 1e-4}.get(next(model.parameters()).dtype, 3e-2)
    gap = (own_NV.to(ours_NV.dtype) - ours_NV).abs().max().item()
    size = own_NV.abs().max().item()
    if not gap <= rounding * max(size, 1e-3):
        if not math.isfinite(size):
            raise UserError(f"{setting}: its logits are not finite; its weights hold NaN or infinity, or its dtype is too narrow")
        raise UserError(
            f"{setting}: the logits that llmkd computes for {model.config.model_type} differ from the model's own by {gap:.2g} of {size:.2g}; "
            "this family's head is not supported"
        )


def load_teacher(settings: TeacherSettings, vocab: int, device) -> LanguageModel:
    """The teacher, frozen and in eval mode. A model, or an unmerged adapter on its base."""
    files = find(settings.model, "teacher.model", settings.revision, settings.base)
    model = _load_base(files.base, "teacher.model", settings.dtype, settings.attention).to(device)
    if files.adapter:
        model = _load_adapter(model, files, "teacher.model")
    teacher = LanguageModel(model, _fits(model, vocab, "teacher.model"))
    teacher.requires_grad_(False).eval()
    check_head(teacher, "teacher.model")
    return teacher


def load_student(settings: StudentSettings, vocab: int, device, seed: int) -> LanguageModel:
    """The student in training mode; exactly what `method` names requires a gradient."""
    torch.manual_seed(seed)
    if settings.architecture is not None:
        model = _new_model(settings, vocab)
    else:
        files = find(settings.model, "student.model", settings.revision)
        if files.adapter:
            raise UserError(
                f"student.model: {settings.model} is an adapter; name a base model (or export the run to a merged folder first)"
            )
        model = _load_base(files.base, "student.model", settings.dtype, settings.attention)
    dtype = next(model.parameters()).dtype
    if settings.method == "full" and dtype == torch.float16:
        raise UserError("student.dtype: float16 weights cannot be trained in full; set float32, with mixed_precision: bf16 for speed")
    if settings.method == "full" and dtype == torch.bfloat16:
        say("note: bfloat16 weights lose updates below 1/256 of a weight; dtype: float32 with mixed_precision: bf16 keeps them")
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if settings.method == "lora":
        model = _add_lora(model, settings)
    student = LanguageModel(model.to(device), _fits(model, vocab, "student.model"))
    check_head(student, "student.model")
    student.autocast = torch.bfloat16 if settings.mixed_precision == "bf16" else None
    return student.train()


def student_folder(run: str | Path) -> Path:
    """Where a finished run keeps its student: `adapter` or `model`."""
    for name in ("adapter", "model"):
        if (Path(run) / name).is_dir():
            return Path(run) / name
    raise UserError(f"{run}: holds neither adapter nor model; is the run finished?")


def save(model: LanguageModel, tokenizer, folder: Path) -> None:
    """The student in Hugging Face's form: an adapter (PEFT) or a whole model, with tokenizer and generation config."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model.model, "peft_config"):
        model.model.save_pretrained(folder, save_embedding_layers=False)
        model.plain.generation_config.save_pretrained(folder)
        base = Path(model.plain.config._name_or_path)
        (folder / RECORD).write_text(json.dumps({"base_fingerprint": fingerprint(base, "student.model")}, indent=1) + "\n")
    else:
        model.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def merge(files: ModelFiles, vocab: int, checkpoint: Path | None = None) -> nn.Module:
    """The base with the adapter merged into it (in float32, then cast back): a plain transformers model.

    With `checkpoint` the adapter's weights are those of that checkpoint. A tied head is untied where the adapter
    changes the head or the embedding, since one merged tensor could not be both. UserError if the logits moved.
    """
    base = _load_base(files.base, "export", "auto", "auto")
    kept = next(base.parameters()).dtype
    base = base.to(torch.promote_types(kept, torch.float32))
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    names = {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if module is head or module is embedding}
    touched = any(f".{name}." in key for name in names for key in tensors(files.adapter / "adapter_model.safetensors"))
    if head.weight is embedding.weight and touched:
        head.weight = nn.Parameter(head.weight.detach().clone())
        base.config.tie_word_embeddings = False
    adapted = _load_adapter(base, files, "export").eval()
    if checkpoint:
        _put(adapted, checkpoint)
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
    model = _load_base(model_folder, "export", "auto", "auto")
    _put(model, checkpoint)
    return model


def _put(model: nn.Module, checkpoint: Path) -> None:
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    weights = load_file(checkpoint / "student.safetensors")
    if not weights.keys() <= parameters.keys():
        raise UserError(f"export: {checkpoint} holds weights that this model does not have")
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _load_base(folder: Path, setting: str, dtype: str, attention: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise UserError(f"{setting}: {folder} cannot be loaded ({_brief(error)})") from error
    for what, keys in (
        ("lacks", report["missing_keys"]),
        ("holds, beyond its architecture,", report["unexpected_keys"]),
        ("has wrong shapes of", report["mismatched_keys"]),
    ):
        if keys:
            raise UserError(
                f"{setting}: {folder} {what} {len(keys)} tensors, such as {sorted(map(str, keys))[0]}; its config.json and weights do not belong together"
            )
    return model


def _load_adapter(base: nn.Module, files: ModelFiles, setting: str) -> nn.Module:
    """PEFT loads an adapter of another depth or base without a word: the keys must match exactly, and be finite."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    path = files.adapter / "adapter_model.safetensors"
    try:
        found = tensors(path)
        weights = load_file(path)
        model = PeftModel.from_pretrained(base, files.adapter, is_trainable=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{setting}: the adapter {files.adapter} cannot be loaded ({_brief(error)})") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    copies = {name for name in found.keys() - expected.keys() if _is_base_weight(model, name, weights[name])}
    for what, keys in (("lacks", expected.keys() - found.keys()), ("holds left-over", found.keys() - expected.keys() - copies)):
        if keys:
            raise UserError(
                f"{setting}: the adapter {files.adapter} {what} {len(keys)} tensors for the base {files.base}, such as {min(keys)}; it belongs to another base"
            )
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{setting}: the adapter {files.adapter} holds values that are not finite, in {name}; train or copy it again")
    return model


def _is_base_weight(model: nn.Module, name: str, value: Tensor) -> bool:
    """PEFT saves the base's own head or embedding beside an adapter on it; that is no left-over if it is the same."""
    parameters = dict(model.named_parameters())
    own = parameters.get(name, parameters.get(name.replace(".weight", ".base_layer.weight")))
    return own is not None and own.shape == value.shape and torch.equal(own.cpu(), value.to(own.dtype))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _add_lora(model: nn.Module, settings: StudentSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = settings.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        revision=settings.revision,
    )
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"student.lora.target_modules: {str(error).splitlines()[0][:200]}") from error
    path = Path(settings.model)
    model.peft_config["default"].base_model_name_or_path = str(path.resolve()) if path.is_dir() else settings.model
    return model


def _new_model(settings: StudentSettings, vocab: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    wanted = {"vocab_size": vocab, **settings.architecture}
    try:
        config = AutoConfig.for_model(**wanted)
        ignored = [k for k in wanted if k != "model_type" and not hasattr(type(config)(), k)]
        if ignored:
            raise UserError(f"student.architecture.{ignored[0]}: unknown to {wanted['model_type']}")
        dtype = DTYPES.get(settings.dtype, torch.float32)
        attention = None if settings.attention == "auto" else settings.attention
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"student.architecture: transformers refuses it ({_brief(error)})") from error


def _fits(model: nn.Module, vocab: int, setting: str) -> int:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab:
        raise UserError(f"{setting}: the tokenizer has {vocab} entries and the model's embedding {rows}; they do not belong together")
    return vocab
