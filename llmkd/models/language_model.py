"""A causal LM, split into its body (token ids to last hidden states) and its head."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import View
from ..head import Head
from ..signals import NO_TAPS, Taps
from .families import body_of, decoder_of, head_of, layers_of
from .last_layer import at_rows
from .model import Capabilities as Capabilities
from .model import Model, ModelOutputs
from .packing_detection import no_packing_detection
from .taps import attention_tapped, tapped


class LanguageModel(Model):
    """A causal language model; see `Model`. `load.py` builds finished ones."""

    def own_head(self, vocab: int, adapter: str | None = None) -> Head:
        return head_of(self.base_model, vocab, adapter)

    @property
    def device(self) -> torch.device:
        """The device of its inputs."""
        return self.input_device or self.base_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the unquantised weights."""
        return self.base_model.get_input_embeddings().weight.dtype

    def outputs(self, view: View, taps: Taps = NO_TAPS) -> ModelOutputs:
        """One forward pass: the last hidden states at the view's rows, and the tensors of `taps`."""
        self.set_active_adapter()
        if self.dropout_masks:
            self.dropout_masks.begin(view)
        # Without autocast's cache of cast weights: each is read once, and the cache would hold all of them until the end of the pass.
        autocast = torch.autocast(view.rows_N.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
        base, last = self.base_model, None if taps.queries else self.capabilities.last_layer
        layers_tapped, inputs_tapped = tapped(base, taps.layers, view.rows_N), attention_tapped(base, taps.attention)
        with autocast, no_packing_detection(view), at_rows(last, view), layers_tapped as layers, inputs_tapped as attention:
            if self.capabilities.own_forward:
                return ModelOutputs(self._logits(view), layers, attention)
            hidden_BTH = body_of(self.base_model)(**self.model_inputs(view), use_cache=False)[0]
        return ModelOutputs(hidden_BTH.flatten(0, 1).index_select(0, view.rows_N), layers, attention)

    def depth(self, setting: str) -> int:
        """The number of its layers. UserError for a family without a list of layers. `setting`: the model's name in the recipe."""
        self.widths((), setting)
        return len(layers_of(self.base_model))

    def widths(self, layers: Sequence[int], setting: str) -> dict[int, int]:
        """The width of the hidden states after each of `layers`; see `startup_checks.layer_widths`."""
        from .startup_checks import layer_widths

        return layer_widths(self, layers, setting)

    def model_inputs(self, view: View) -> dict[str, Tensor]:
        """The model's keyword arguments: the view's inputs, with the layout of a packed row as `attention_mask`."""
        packed = view.packed and self.capabilities.packed_attention
        return view.inputs | ({"attention_mask": view.packed.mask()} if packed else {})

    def _logits(self, view: View) -> Tensor:
        """The model's own logits [N, V] at the view's rows. If the model allows, logits are computed only in columns with a target."""
        T = view.T
        columns, wanted = (view.rows_N % T).unique(return_inverse=True)
        if "logits_to_keep" not in inspect.signature(self.base_model.forward).parameters or not len(columns):
            return self.base_model(**self.model_inputs(view), use_cache=False).logits.flatten(0, 1).index_select(0, view.rows_N)
        logits_BCV = self.base_model(**self.model_inputs(view), use_cache=False, logits_to_keep=columns).logits
        return logits_BCV.flatten(0, 1).index_select(0, view.rows_N // T * len(columns) + wanted)

    def next_logits(self, inputs: dict[str, Tensor], cache=None, use_cache: bool = True) -> tuple[Tensor, object | None]:
        """Logits [B, V] of the token after the last one of each row, and with `use_cache` the cache of keys and values of all tokens so far.

        inputs  input_ids and position_ids [B, T] of the tokens that are not in the cache; attention_mask of all tokens, cached ones included
        cache   keys and values of the tokens before; None if there are none
        """
        self.set_active_adapter()
        own = self.capabilities.own_forward
        known = inspect.signature((self.base_model if own else decoder_of(self.base_model)).forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in known or name == "input_ids"}
        last = {"logits_to_keep": 1} if own and "logits_to_keep" in known else {}
        before = {} if cache is None else {"past_key_values": cache}
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            out = (self.base_model if own else body_of(self.base_model))(**inputs, **before, **last, use_cache=use_cache)
            logits_BV = self.head.logits(out[0][:, -1])
        return logits_BV, out.get("past_key_values") if use_cache else None
