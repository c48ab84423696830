"""The stages by the name that `do:` has. Their settings, under the same names, are in `config/make_stages.py`. No torch."""

from .stage import Stage
from .stages.answer import Answer

STAGES: dict[str, type[Stage]] = {"answer": Answer}
