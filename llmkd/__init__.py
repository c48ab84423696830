"""White-box distillation of a large causal language model into a small one."""

__version__ = "0.1.0"
