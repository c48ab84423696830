"""White-box distillation of a large causal language model into a small one.

The names of `__all__` are the Python API. Each is imported when it is first used, so that `import llmkd` and `llmkd.load_recipe`
need no torch. `__init__.pyi` declares them for type checkers.
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "load_recipe": "config.loader",
    "Recipe": "config.recipe",
    "train": "api",
    "register": "tasks.builtin",
    "fused_loss": "api",
    "make_divergence": "api",
    "register_target_weights": "losses.target_weights",
    "Objective": "losses.objective",
    "Divergence": "signals",
    "Head": "head",
    "Batch": "batch",
    "View": "batch",
    "Example": "batch",
    "Teacher": "signals",
    "Signal": "signals",
    "FullDistribution": "signals",
    "Dense": "signals",
    "TeacherCache": "teachers.cache.shards",
    "CachedTeacher": "teachers.cached",
    "UserError": "errors",
    "ArgumentError": "errors",
    "NonFinite": "errors",
    "Stopped": "errors",
}

__all__ = ["__version__", "divergences", *_MODULES]


def __getattr__(name: str):
    if name == "divergences":
        return importlib.import_module("llmkd.losses.divergences")
    if name not in _MODULES:
        raise AttributeError(f"module 'llmkd' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"llmkd.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
