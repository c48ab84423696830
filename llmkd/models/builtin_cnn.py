"""A small convolutional classifier for log-mel features or images, as a transformers model: it is saved, loaded and used like any other.

The mean and the maximum over all positions of the last block's values go into the last layer. Normalisation is over all channels of one
example (Wu and He 2018, "Group Normalization"), so that its logits do not depend on the rest of the micro-batch, as they would with batch
normalisation.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput


class BuiltinCnnConfig(PreTrainedConfig):
    """The configuration of `BuiltinCnnForClassification`.

    inputs     input_features (log-mel, one channel) or pixel_values (images)
    width      channels of the first block; each further block has twice as many
    blocks     number of blocks of convolution, normalisation, ReLU and pooling, each of which halves height and width
    channels   of the input; by default 1 for sound and 3 for images
    dropout    before the last layer
    """

    model_type = "builtin_cnn"

    def __init__(self, inputs="input_features", width=16, blocks=3, channels=None, dropout=0.0, **others):
        self.inputs, self.width, self.blocks, self.dropout = inputs, width, blocks, dropout
        self.channels = (1 if inputs == "input_features" else 3) if channels is None else channels
        super().__init__(**others)


class BuiltinCnnForClassification(PreTrainedModel):
    """The model; see the docstring of this file."""

    config_class = BuiltinCnnConfig
    base_model_prefix = "blocks"
    main_input_name = "input_features"

    def __init__(self, config: BuiltinCnnConfig):
        super().__init__(config)
        self.main_input_name = config.inputs
        widths = [config.channels, *(config.width * 2**i for i in range(config.blocks))]
        self.blocks = nn.ModuleList(_Block(before, after) for before, after in zip(widths, widths[1:], strict=False))
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(2 * widths[-1], config.num_labels)
        self.post_init()

    def forward(
        self,
        input_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple:
        """input_features [B, M, F] or [B, 1, M, F], or pixel_values [B, C, height, width]; labels [B]. Logits [B, num_labels].

        With `output_hidden_states` also the hidden states of each block, [B, positions, channels].
        """
        x = input_features if pixel_values is None else pixel_values
        x, states = x.unsqueeze(1) if x.dim() == 3 else x, []
        for block in self.blocks:
            x = block(x)
            states.append(x.flatten(2).mT)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        out = SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=tuple(states) if output_hidden_states else None)
        return out.to_tuple() if return_dict is False else out

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            nn.init.zeros_(module.bias)


class _Block(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(1, after)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.norm(self.convolution(x))), 2)


def register() -> None:
    """Register the model with transformers' Auto classes. Call it before one is loaded; repeated calls have no effect."""
    AutoConfig.register(BuiltinCnnConfig.model_type, BuiltinCnnConfig, exist_ok=True)
    for auto in (AutoModelForAudioClassification, AutoModelForImageClassification):
        auto.register(BuiltinCnnConfig, BuiltinCnnForClassification, exist_ok=True)
