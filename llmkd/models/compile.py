"""torch.compile of a model's layers, one by one: code compiled for one layer is used for all layers like it."""

import torch
from torch import Tensor

from ..batch import PackedLayout, View
from ..errors import UserError, brief
from .families import layers_of
from .probe import hidden_and_gradients, probe_ids, relative_gap
from .sharding import all_agree
from .startup_checks import tolerance

BACKEND = "inductor"
#: Length of the rows in the first compiled pass, by device: a GPU's kernels are chosen for it. It must not equal a width of the model, since
#: torch.compile would treat two sizes that are equal at first as one.
_LENGTH = {"cuda": 1021, "cpu": 23}
_VARIANTS = 256  # versions of a layer's code: by student, position, training or not, one row or several


def configure_torch_compile(device: torch.device) -> None:
    """Set the options of torch.compile that `compile_layers` needs. UserError if torch.compile does not work here."""
    import torch._dynamo
    import torch._inductor.config

    dynamo = torch._dynamo.config
    dynamo.skip_nnmodule_hook_guards = False  # else code with the last layer's hooks would be used for other layers, and vice versa
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VARIANTS)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 16 * _VARIANTS)
    torch._inductor.config.fallback_random = True  # the same dropout masks as without compilation
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(8, device=device))
    except Exception as error:
        raise UserError(
            f"train.compile: found true, but torch.compile fails here ({brief(error)}); it needs a C++ compiler, and on a GPU also Triton: "
            "install them, or set train.compile: false"
        ) from error


def compile_layers(model, setting: str, packing: bool) -> None:
    """Compile the layers of a `LanguageModel`. UserError if the results on a batch like the run's differ from those of the eager model.

    No module gets another name or parent. For a sharded model the hooks that gather a layer's weights are not compiled. Students that share
    modules are compared one by one.
    """
    layers, family = layers_of(model.base_model), model.base_model.config.model_type
    if layers is None:
        raise UserError(f"train.compile: {setting} ({family}) does not keep its layers in a list; set train.compile: false")
    with torch.compiler.set_stance("force_eager"):
        whole = _results(model, packing)
    for layer in layers:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=True, backend=BACKEND)
    try:
        found = _results(model, packing)
    except Exception as error:
        raise UserError(f"train.compile: {setting} ({family}) cannot be compiled ({brief(error)}); set train.compile: false") from error
    off = max(relative_gap(whole[:1], found[:1]), relative_gap(whole[1:], found[1:]) / 10)
    if not all_agree(model.model, off <= max(tolerance(model), 1e-5)):  # norms are float32, whatever the other dtypes are
        raise UserError(f"train.compile: {setting} ({family}), compiled, differs by {off:.2g} of its values; set train.compile: false")


def _results(model, packing: bool) -> list[Tensor]:
    """Hidden states and gradients under conditions like the run's: the model's mode, dropout, and two of three positions supervised."""
    device = model.device
    T = min(_LENGTH.get(device.type, 23), getattr(model.base_model.config.get_text_config(), "max_position_embeddings", None) or 23)
    ids_BT = probe_ids(model.head.vocab, device, T)
    inputs, packed = {"input_ids": ids_BT}, None
    if packing:
        inputs = {"input_ids": ids_BT.reshape(1, -1), "position_ids": torch.arange(T, device=device).repeat(2)[None]}
        packed = PackedLayout.of([T, T]).each(lambda x: x.to(device))
    places = torch.arange(2 * T, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return hidden_and_gradients(model, View(inputs, places[places % 3 > 0], packed))
