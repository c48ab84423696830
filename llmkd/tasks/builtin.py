"""Lets transformers' Auto classes and pipelines know the built-in classifier and what reads sound for it."""


def register() -> None:
    """To be called before such a model is loaded outside of llmkd; more than once is as once."""
    from transformers import AutoFeatureExtractor

    from ..data.audio.feature_extractor import LogMelFeatureExtractor
    from ..models.builtin_cnn import BuiltinCnnConfig, register

    register()
    AutoFeatureExtractor.register(BuiltinCnnConfig, LogMelFeatureExtractor, exist_ok=True)
