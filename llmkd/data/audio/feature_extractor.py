"""`LogMel` as a feature extractor of transformers, so that it is saved with a model and used by pipelines."""

from collections.abc import Sequence

import numpy as np
from transformers import BatchFeature, SequenceFeatureExtractor

from .log_mel import LogMel


class LogMelFeatureExtractor(SequenceFeatureExtractor):
    """
    feature_size    bands M
    sampling_rate   samples a second, a multiple of 200
    seconds         length of every clip's features
    """

    model_input_names = ["input_features"]

    def __init__(self, feature_size=80, sampling_rate=16_000, padding_value=0.0, seconds=1.0, **others):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **others)
        self.seconds = seconds

    def __call__(self, raw_speech, sampling_rate: int | None = None, return_tensors: str | None = None, **_) -> BatchFeature:
        """One clip [S] or a list of them to input_features [B, M, F] in float32. ValueError for clips of another rate."""
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"found clips of {sampling_rate} Hz, expected {self.sampling_rate} Hz; resample them")
        one = not isinstance(raw_speech, Sequence) or not len(raw_speech) or np.ndim(raw_speech[0]) == 0
        log_mel = LogMel(self.sampling_rate, self.feature_size, self.seconds)
        features = [log_mel(np.asarray(clip, np.float32)) for clip in ([raw_speech] if one and np.ndim(raw_speech) < 2 else raw_speech)]
        return BatchFeature({"input_features": np.stack(features)}, tensor_type=return_tensors)
