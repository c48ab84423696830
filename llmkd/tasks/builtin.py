"""Lets transformers' Auto classes and pipelines know the built-in classifier and what reads sound for it; and which kinds of inputs classifiers read."""


def register() -> None:
    """To be called before such a model is loaded outside of llmkd; more than once is as once."""
    from transformers import AutoFeatureExtractor

    from ..data.audio.feature_extractor import LogMelFeatureExtractor
    from ..models.builtin_cnn import BuiltinCnnConfig, register

    register()
    AutoFeatureExtractor.register(BuiltinCnnConfig, LogMelFeatureExtractor, exist_ok=True)


def kinds_of_classifier(architecture: str, config: dict) -> list[str]:
    """Which of text, audio and image a class of classifiers reads, by its name in config.json; empty where it is not known."""
    from transformers.models.auto import modeling_auto

    if architecture == "BuiltinCnnForClassification":
        return ["image" if config.get("inputs") == "pixel_values" else "audio"]
    lists = {"text": "SEQUENCE", "audio": "AUDIO", "image": "IMAGE"}
    found = {kind: getattr(modeling_auto, f"MODEL_FOR_{name}_CLASSIFICATION_MAPPING_NAMES").values() for kind, name in lists.items()}
    return [
        kind
        for kind, names in found.items()
        if architecture in names or any(architecture in one for one in names if isinstance(one, tuple))
    ]
