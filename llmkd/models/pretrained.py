"""Loads a folder with transformers, and makes the checks that it does not: missing, unknown and misshapen tensors are refused."""

import bisect
import contextlib
import functools
import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from ..config.recipe import Quantization
from ..config.recipe import Student as StudentSettings
from ..console import info
from ..errors import UserError, brief
from ..model_folder.files import attention_of, check_config, loaded_dtype
from ..model_folder.identity import unchanged, verify
from ..model_folder.quantised import refuse_quantised
from ..model_folder.weights import headers, read_json
from .adapter_names import WRAPPERS, without_wrappers
from .parts import is_part
from .quantization import DTYPES, bitsandbytes_config, note_share

CAUSAL_LM = "AutoModelForCausalLM"
#: Names of float types in safetensors files.
STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
#: Buffers that older versions of transformers saved with the weights, and that newer ones compute.
_OLD_BUFFERS = (".masked_bias", ".attn.bias", ".rotary_emb.inv_freq")


def load_pretrained(
    folder: Path,
    setting: str,
    dtype: str = "auto",
    attention: str = "auto",
    device="cpu",
    quantization: Quantization | None = None,
    auto: str = CAUSAL_LM,
) -> nn.Module:
    """A model from its folder, on `device`. UserError unless every tensor fits its configuration.

    auto     the name of the transformers class that loads it
    device   None for a model that is to be sharded: weights that are not cast stay mapped from their files
    """
    verify(folder, None, setting)
    _refuse_missing_attention(folder, setting, attention)
    options = {}
    refuse_quantised(folder, read_json(folder / "config.json", setting), setting, quantization is not None)
    if quantization:
        options = {"quantization_config": bitsandbytes_config(quantization, dtype, folder, setting), "device_map": {"": device}}
    renaming = _unwrapping(folder, setting)
    model = _read(folder, setting, DTYPES.get(dtype, "auto"), attention, auto, key_mapping=renaming or None, **options)
    for module in model.modules():
        # Oddity: an attribute of bitsandbytes' modules. Without this they would repack the weights in eval mode, into a form without a gradient.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if quantization:
        note_share(model, setting)
    if renaming:
        # Oddity: a private attribute of transformers. With these conversions, saving would give the tensors their wrapped names back.
        model._weight_conversions = [one for one in model._weight_conversions if one.source_patterns[0] not in renaming]
    if device is not None:
        model = model if getattr(model, "is_loaded_in_8bit", False) else model.to(device)
        own_memory(model)
    return model


def _read(folder: Path, setting: str, dtype, attention: str, auto: str, **options) -> nn.Module:
    """A model as transformers loads it. UserError unless its tensors are exactly those of its configuration."""
    import transformers

    try:
        with unchanged([folder], setting):
            model, report = getattr(transformers, auto).from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=None if attention == "auto" else attention,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except UserError:
        raise
    except Exception as error:
        fix = "check its files, or use another model"
        if "quantization_config" in options:
            fix = f"load it without {setting.rpartition('.')[0]}.quantization, or check its files"
        raise UserError(f"{setting}: {folder} cannot be loaded ({brief(error)}); {fix}") from error
    wrong = {
        "lacks": report["missing_keys"],
        "holds, beyond its architecture,": [k for k in report["unexpected_keys"] if not str(k).endswith(_OLD_BUFFERS)],
        "has wrong shapes of": report["mismatched_keys"],
    }
    sides = [f"{what} {len(keys)} tensors, such as {min(map(str, keys))}" for what, keys in wrong.items() if keys]
    if sides:
        raise UserError(f"{setting}: {folder} {', and '.join(sides)}; its config.json and weights do not belong together")
    return model


def load_as_stored(
    folder: Path, setting: str, dtype: str, attention: str, auto: str = CAUSAL_LM, adapter: bool = False
) -> tuple[nn.Module, dict[int, torch.dtype]]:
    """A model to be sharded, with weights that are mapped from their files and cast later; and the dtypes that they are to get, by the
    parameters' ids, or {} if they have them already. UserError as from `load_pretrained`.

    adapter  whether an adapter is put on it. PEFT creates adapters in float32, so a model in float64 is cast while it is loaded
    """
    verify(folder, None, setting)
    _refuse_missing_attention(folder, setting, attention)
    stored = {one["dtype"] for one in headers(folder, setting).values()} & STORED.keys()
    config = read_json(folder / "config.json", setting)
    wanted = DTYPES[loaded_dtype(config, dtype)]
    cast = len(stored) == 1 and "quantization_config" not in config and not (adapter and (wanted == torch.float64 or "F64" in stored))
    if cast and STORED[one := stored.pop()] != wanted:
        renaming = _unwrapping(folder, setting) or None
        shapes = _read(folder, setting, DTYPES.get(dtype, "auto"), attention, auto, key_mapping=renaming, device_map={"": "meta"})
        types = {name: p.dtype for name, p in shapes.named_parameters()}
        if set(types.values()) != {STORED[one]}:
            model = load_pretrained(folder, setting, str(STORED[one]).removeprefix("torch."), attention, None, auto=auto)
            if _with_buffers_of(shapes, model):
                model.config.__dict__.update(shapes.config.__dict__)
                return model, {id(p): types[name] for name, p in model.named_parameters()}
    return load_pretrained(folder, setting, dtype, attention, None, auto=auto), {}


@contextlib.contextmanager
def cast_without_values(model: nn.Module, types: Mapping[int, torch.dtype]) -> Iterator[None]:
    """Inside, the weights of `load_as_stored` have the dtypes that they are to get, with zeros as values, which take no memory. So an adapter
    that is created there is the same as on the cast model. No weight may be read, copied or trained inside."""
    held = [(p, p.data) for p in model.parameters() if id(p) in types]
    for p, _ in held:
        p.data = torch.zeros((), dtype=types[id(p)]).expand(p.shape)
    try:
        yield
    finally:
        for p, values in held:
            p.data = values


def _with_buffers_of(shapes: nn.Module, model: nn.Module) -> bool:
    """Give `model` the buffers that it would have in the dtype of `shapes`, the same model on torch's meta device: families compute some buffers
    in the dtype of the weights, such as Gemma's scale of embeddings. False for a family whose `_init_weights` does not compute them."""
    for name, module in shapes.named_modules():
        held = model.get_submodule(name)._buffers
        for which, empty in module._buffers.items():
            if empty is None or empty.dtype == held[which].dtype:
                continue
            if which not in module._non_persistent_buffers_set:
                held[which] = held[which].to(empty.dtype)
                continue
            module._buffers[which] = torch.full_like(empty, math.nan, device="cpu")
            with torch.no_grad():
                shapes._init_weights(module)
            held[which] = module._buffers[which]
            if held[which].isnan().any():
                return False
    return True


def _refuse_missing_attention(folder: Path, setting: str, attention: str) -> None:
    """UserError if config.json asks for FlashAttention and it is not installed: transformers would fetch a kernel from the hub."""
    config = read_json(folder / "config.json", setting)
    wanted = [one for one in attention_of(config) if one.startswith("flash_attention")]
    if attention == "auto" and wanted and importlib.util.find_spec("flash_attn") is None:
        fix = f"set {setting.removesuffix('.model')}.attention: sdpa" if setting.endswith(".model") else "remove that line"
        raise UserError(f"{setting}: {folder}/config.json asks for {wanted[0]}, but flash-attn is not installed; {fix}")


def _unwrapping(folder: Path, setting: str) -> dict[str, str]:
    """The renaming patterns for the tensors of a checkpoint that was saved under torch.compile, FSDP or DDP; {} for any other.

    UserError if two tensors would get the same name.
    """
    names = list(headers(folder, setting))
    plain = {name: without_wrappers(name) for name in names}
    if not (wrapped := [name for name in names if plain[name] != name]):
        return {}
    if len(set(plain.values())) < len(names):
        raise UserError(
            f"{setting}: {folder} holds tensors with names of torch's wrappers, such as {wrapped[0]}, and others without; save it again with "
            "the model's own save_pretrained"
        )
    _note(
        f"{setting}: {len(wrapped)} of the tensors of {folder} have names of torch's wrappers, such as {wrapped[0]}; it is read as {plain[wrapped[0]]}"
    )
    most = max(len(name.split(".")) - len(plain[name].split(".")) for name in wrapped)
    # Each pattern replaces one occurrence and is a key of a dict, so for further occurrences it is repeated with one more empty group.
    again = {"(?:)" * n + rf"(?<![^.]){one}\.": "" for n in range(most) for one in WRAPPERS if one != "module"}
    return {r"^(?:module\.)+": "", **again, r"(?:)^(?:module\.)+": ""}


@functools.cache
def _note(text: str) -> None:
    """Print a line once per process, however often a model is loaded."""
    info(text)


def own_memory(model: nn.Module) -> None:
    """Copy the weights that are still mapped from their files, so that a change of a file neither changes nor ends the run."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
        places = [found.groups() for found in re.finditer(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]", maps, re.MULTILINE)]
        mapped = sorted((int(start, 16), int(stop, 16)) for start, stop in places)
    except OSError:  # not Linux: all may be mapped
        mapped = [(0, 1 << 64)]
    starts = [start for start, _ in mapped]
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.numel() and not is_part(tensor):
            place = bisect.bisect_right(starts, tensor.data_ptr()) - 1
            if place >= 0 and tensor.data_ptr() < mapped[place][1]:
                tensor.data = tensor.data.clone()


def new_model(settings: StudentSettings, implied: dict, auto: str = CAUSAL_LM) -> nn.Module:
    """A model of `settings.architecture` with random weights. `implied`: defaults for its configuration."""
    import transformers

    wanted = {**implied, **settings.architecture}
    try:
        check_config(wanted, "the architecture", "student.architecture")
        config = transformers.AutoConfig.for_model(**wanted)
        ignored = [k for k in wanted if k != "model_type" and not hasattr(type(config)(), k)]
        if ignored:
            raise UserError(f"student.architecture.{ignored[0]}: unknown to {wanted['model_type']}; leave it out")
        dtype = DTYPES.get(settings.dtype, torch.float32)
        attention = None if settings.attention == "auto" else settings.attention
        return getattr(transformers, auto).from_config(config, dtype=dtype, attn_implementation=attention)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"student.architecture: transformers cannot build it ({brief(error)}); correct it") from error
