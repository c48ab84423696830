"""Registers the built-in classifier and its feature extractor with transformers' Auto classes and pipelines."""


def register() -> None:
    """Call it before loading such a model outside llmkd. Further calls change nothing."""
    from transformers import AutoFeatureExtractor

    from ..data.audio.feature_extractor import LogMelFeatureExtractor
    from ..models.builtin_cnn import BuiltinCnnConfig, register

    register()
    AutoFeatureExtractor.register(BuiltinCnnConfig, LogMelFeatureExtractor, exist_ok=True)
