"""Weights from a folder into transformers and PEFT, strictly: what they would load without a word is refused here."""

from pathlib import Path

import torch
from torch import Tensor, nn

from .console import say
from .errors import UserError
from .families import beside_text
from .model_files import ModelFiles, read_json, tensors
from .recipe import Lora, Quantization
from .recipe import Student as StudentSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

#: Masks and tables that older versions of transformers saved with the weights and newer ones compute.
_OLD_BUFFERS = (".masked_bias", ".attn.bias", ".rotary_emb.inv_freq")
#: PEFT's types that change what the model reads, or need PEFT's own forward pass, and not (only) its weights.
_NO_WEIGHTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE", "XLORA")


def base(
    folder: Path, setting: str, dtype: str = "auto", attention: str = "auto", device="cpu", quantization: Quantization | None = None
) -> nn.Module:
    """A model as its folder holds it, on `device`. UserError unless every tensor fits its configuration."""
    from transformers import AutoModelForCausalLM

    options = {}
    if quantization:
        if "quantization_config" in read_json(folder / "config.json", setting):
            raise UserError(
                f"{setting.removesuffix('.model')}.quantization: {folder} is quantised already; leave it out, or name the unquantised model"
            )
        options = {"quantization_config": bitsandbytes_config(quantization, dtype, folder, setting), "device_map": {"": device}}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, "auto"),
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise UserError(f"{setting}: {folder} cannot be loaded ({brief(error)})") from error
    for what, keys in (
        ("lacks", report["missing_keys"]),
        ("holds, beyond its architecture,", [k for k in report["unexpected_keys"] if not str(k).endswith(_OLD_BUFFERS)]),
        ("has wrong shapes of", report["mismatched_keys"]),
    ):
        if keys:
            raise UserError(
                f"{setting}: {folder} {what} {len(keys)} tensors, such as {sorted(map(str, keys))[0]}; its config.json and weights do not belong together"
            )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # in eval mode it would repack the weights into a form without a gradient
            module.support_avx512bf16_for_cpu = False
    if quantization:
        _note_share(model, setting)
    return model if getattr(model, "is_loaded_in_8bit", False) else model.to(device)


def _note_share(model: nn.Module, setting: str) -> None:
    """Only linear layers are quantised; a mixture of experts may hold most of its weights otherwise."""
    size = {p: p.numel() * p.element_size() for p in model.parameters()}
    quantised = sum(bytes_ for p, bytes_ in size.items() if p.dtype in (torch.int8, torch.uint8))
    if quantised < 0.2 * (total := sum(size.values())):
        say(
            f"note: {setting}: quantised linear layers are {quantised / total:.0%} of what it still takes in memory; embeddings, head and "
            "experts that are no linear layers are as they were"
        )


def bitsandbytes_config(settings: Quantization, dtype: str, folder: Path, setting: str):
    """What transformers wants to hear for a base in 4 or 8 bit."""
    from transformers import BitsAndBytesConfig

    if settings.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    config = read_json(folder / "config.json", setting)
    saved = config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype") or "float32"
    compute = next(name for name in (settings.compute_dtype, dtype, saved) if name != "auto")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.type,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=DTYPES[compute],
    )


def adapter(model: nn.Module, files: ModelFiles, setting: str, trainable: bool = False, name: str = "default") -> nn.Module:
    """PEFT loads an adapter of another depth or base without a word: the keys must match exactly, and be finite.

    A model that has adapters already gets this one beside them, as `name`.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    path = files.adapter / "adapter_model.safetensors"
    config = read_json(files.adapter / "adapter_config.json", setting)
    kind = "aLoRA" if config.get("alora_invocation_tokens") else config.get("peft_type")
    if kind == "aLoRA" or kind in _NO_WEIGHTS:
        raise UserError(
            f"{setting}: {files.adapter} is an adapter of type {kind}, which is more than a change of weights; only those, such as LORA, are supported"
        )
    try:
        found = tensors(path)
        weights = load_file(path)
        if isinstance(model, PeftModel):
            model.load_adapter(files.adapter, adapter_name=name, is_trainable=trainable)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, files.adapter, adapter_name=name, is_trainable=trainable)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{setting}: the adapter {files.adapter} cannot be loaded ({brief(error)})") from error
    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    copies = {name for name in found.keys() - expected.keys() if _is_base_weight(adapted, name, weights[name])}
    for what, keys in (("lacks", expected.keys() - found.keys()), ("holds left-over", found.keys() - expected.keys() - copies)):
        if keys:
            raise UserError(
                f"{setting}: the adapter {files.adapter} {what} {len(keys)} tensors for the base {files.base}, such as {min(keys)}; it belongs to another base"
            )
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{setting}: the adapter {files.adapter} holds values that are not finite, in {name}; train or copy it again")
    return adapted


def _is_base_weight(model: nn.Module, name: str, value: Tensor) -> bool:
    """PEFT saves the base's own head or embedding beside an adapter on it; that is no left-over if it is the same."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.get(name, parameters.get(name.replace(".weight", ".base_layer.weight")))
    return own is not None and own.shape == value.shape and torch.equal(own.cpu(), value.to(own.dtype))


def new_adapter(model: nn.Module, lora: Lora, revision: str | None, name: str = "default") -> nn.Module:
    """The base with a fresh LoRA adapter, which alone requires a gradient; beside those that the model has already, as `name`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    several = isinstance(model, PeftModel)
    plain = model.get_base_model() if several else model
    unused = {id(p) for p in beside_text(plain)}
    beside = [name for name, module in plain.named_modules() if any(id(p) in unused for p in module.parameters(recurse=False))]
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=beside or None,
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        revision=revision,
    )
    names = {name.rsplit(".", 1)[-1] for name, _ in plain.named_modules()}
    if missing := [name for name in lora.modules_to_save if name.rsplit(".", 1)[-1] not in names]:
        raise UserError(f"student.lora.modules_to_save: the model has no module {missing[0]!r}; leave it out")
    try:
        if several:
            if targets == "all-linear":  # PEFT would count the other adapters' matrices among the linear layers
                first = next(iter(model.peft_config.values()))
                config.target_modules, config.exclude_modules = first.target_modules, first.exclude_modules
            model.add_adapter(name, config)
            return model
        return get_peft_model(model, config, adapter_name=name)
    except Exception as error:
        outs = [name for name, _ in plain.named_modules() if name.endswith((".out_proj", ".conv1d"))]
        if "Mamba" in str(error) and targets == "all-linear" and not set(outs) & set(beside):
            say("note: student.lora.target_modules: all-linear leaves out out_proj, whose weight Mamba's kernels use past any adapter")
            config.exclude_modules = beside + outs
            return get_peft_model(model, config, adapter_name=name)
        setting = "student.lora.target_modules" if "target modules" in str(error).lower() else "student.lora"
        raise UserError(f"{setting}: no such adapter can be put on {plain.config.model_type} ({brief(error)})") from error


def new_model(settings: StudentSettings, vocab: int) -> nn.Module:
    """Random weights of `settings.architecture`."""
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
        raise UserError(f"student.architecture: transformers refuses it ({brief(error)})") from error


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
