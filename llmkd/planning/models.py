"""Builds students and teachers from their configurations, on fake tensors, like `models.load` but without weights and values."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..config.recipe import Lora, Student, Teacher
from ..errors import UserError, brief
from ..model_folder.files import loaded_dtype
from ..models import activation_checkpointing, attention, float8, norms
from ..models.classifier import Classifier
from ..models.dropout import follow_examples
from ..models.families import base_of, freeze_encoder, layers_of, non_text_parameters
from ..models.kinds import CAUSAL, ModelKind
from ..models.language_model import LanguageModel
from ..models.last_layer import put_on
from ..models.lora import add_lora
from ..models.model import Model
from ..models.probe import example_view
from ..models.quantization import DTYPES
from .model_configs import ModelConfig, transformers_config
from .quantized import quantize

NOWHERE = Path("/nonexistent")  # stands for the folder of a base that is not on this machine


@dataclass(frozen=True)
class Depth:
    """The layers of a model that are built: the first `layers`, or all (None); a student recomputes the activations of the first `recomputed`."""

    layers: int | None
    recomputed: int = 0


def text_config(config: dict) -> dict:
    return config.get("text_config", config)


def depth_of(config: dict, setting: str) -> int:
    """The number of layers, at least 1, by transformers' configuration, which has the family's defaults; encoder and decoder are added."""
    own = transformers_config(config, setting)
    text = own.get_text_config()
    decoder = (getattr(own, name, None) for name in ("decoder_layers", "num_decoder_layers") if own.is_encoder_decoder)
    return (getattr(text, "num_hidden_layers", None) or getattr(own, "blocks", 1)) + next(filter(None, decoder), 0)


def full_depth(config: dict, checkpointing: bool | float, setting: str) -> Depth:
    """All layers, with those that `student.gradient_checkpointing` recomputes, as chosen by `activation_checkpointing.enable`."""
    layers = depth_of(config, setting)
    if not checkpointing or layers < 2:
        return Depth(layers)
    return Depth(layers, min(max(1, round(checkpointing * layers)), layers - 1))


def empty_model(
    config: dict, setting: str, dtype: str, implementation: str, layers: int | None = None, auto: str = CAUSAL.auto
) -> nn.Module:
    """A model of that configuration without values (in a fake mode, or on torch's meta device). `auto`: the name of the transformers class."""
    import transformers

    own = transformers_config(config, setting)
    text = own.get_text_config()
    if layers is not None and layers < text.num_hidden_layers:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    try:
        with _without_initial_values():
            return getattr(transformers, auto).from_config(
                own,
                dtype=DTYPES[loaded_dtype(config, dtype)],
                attn_implementation=None if implementation == "auto" else implementation,
            )
    except Exception as error:
        raise UserError(f"{setting}: transformers cannot build it ({brief(error)}); correct its config.json") from error


@contextlib.contextmanager
def _without_initial_values() -> Iterator[None]:
    """Skip the initialisation of weights: some families compute initial values from others, which do not exist here."""
    from transformers import PreTrainedModel

    own = PreTrainedModel.initialize_weights
    PreTrainedModel.initialize_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = own


def layer_sizes(config: dict, setting: str) -> tuple[int, ...]:
    """The number of parameters of each layer; () for a family that does not keep its layers in a list."""
    return _layer_sizes(json.dumps(config), setting)


@functools.cache
def _layer_sizes(config: str, setting: str) -> tuple[int, ...]:
    with torch.device("meta"):
        model = empty_model(json.loads(config), setting, "float32", "auto")
    return tuple(sum(p.numel() for p in layer.parameters()) for layer in layers_of(model) or [])


def build_students(
    settings: Sequence[Student], found: Sequence[ModelConfig], vocab: int, depth: Depth, packing: int, kind: ModelKind = CAUSAL
) -> list[Model]:
    """The students, like those of `models.load.load_students`: several share one base, each with its adapter; a single one may use any method."""
    from ..models.lora_product import add_in_place

    first = settings[0]
    model = empty_model(found[0].config, "student.model", first.dtype, first.attention, depth.layers, kind.auto)
    if first.quantization:
        quantize(model, first.quantization)
    if first.method == "full":
        for parameter in non_text_parameters(model):
            parameter.requires_grad_(False)
    if first.freeze:
        freeze_encoder(model)
    if depth.recomputed:
        activation_checkpointing.enable(model, True, first.gradient_checkpointing == "offload")
        for number, layer in enumerate(layers_of(model) or []):
            layer.gradient_checkpointing = number < depth.recomputed
    names: list[str | None] = [None]
    if first.method == "lora":
        model.requires_grad_(False)
        names = [f"student{k}" for k in range(len(settings))] if len(settings) > 1 else ["default"]
        order = sorted(range(len(settings)), key=lambda k: _lora(settings[k], found[k]).target_modules != "all-linear")
        for k in order:
            copies = kind.copies(base_of(model), found[k].files or NOWHERE)
            model = add_lora(model, _lora(settings[k], found[k]), None, names[k], kind.peft, copies, first.freeze is not None)
        follow_examples(model)
        add_in_place(model)
        if len(settings) > 1:
            model.set_adapter(names[0])
    autocast = torch.bfloat16 if first.mixed_precision == "bf16" else None
    models = [kind.wrapper(model, vocab, name, autocast=autocast).train() for name in names]
    return [_as_checked(one, packing, first.attention, kind, "student.model") for one in models]


def _lora(settings: Student, found: ModelConfig) -> Lora:
    return found.adapter or settings.lora or Lora()


def build_teacher(
    settings: Teacher, found: ModelConfig, setting: str, vocab: int, layers: int | None, packing: int, kind: ModelKind = CAUSAL
) -> Model:
    """A live teacher, frozen, like that of `models.load.load_teacher`; with a merged adapter it is just the base."""
    model = empty_model(found.config, f"{setting}.model", settings.dtype, settings.attention, layers, kind.auto)
    if settings.loaded_in:
        quantize(model, settings.loaded_in)
    if found.adapter and not settings.merge_adapter:
        model = add_lora(model, found.adapter, None, kind=kind.peft, copies=kind.copies(base_of(model), found.files or NOWHERE))
    teacher = kind.wrapper(model, vocab)
    teacher.requires_grad_(False).eval()
    if settings.float8:
        float8.convert(teacher.base_model)
    return _as_checked(teacher, packing, settings.attention, kind, f"{setting}.model")


def _as_checked(model: Model, packing: int, implementation: str, kind: ModelKind, setting: str) -> Model:
    """The model with the capabilities that the startup checks are expected to find; the start of a run will see whether they do."""
    if isinstance(model, Classifier):
        with unset_fake_temporarily():
            model.probe = example_view(kind.examples, [0], setting, "cpu")
    if not isinstance(model, LanguageModel):
        return model
    norms.fuse(model.base_model)
    packed = bool(packing and implementation == "auto" and attention.enable(model.base_model))
    last = put_on(model.base_model)
    return model.replaced(capabilities=dataclasses.replace(model.capabilities, packed_attention=packed, last_layer=last))
