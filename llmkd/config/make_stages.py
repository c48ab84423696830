"""Settings of the stages of `llmkd make`, by the name that `do:` has. No torch."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from .fields import Count, config_dataclass, path_to


def prompt_file() -> Any:
    return path_to("file", None, description="A text file of prompts in the place of llmkd's own, with the same sections and places.")


@config_dataclass
class Answer:
    """The writer answers each row: sequence-level distillation, and labels for rows without answers."""

    samples: Count = Field(1, description="Answers to each row.")
    system: str | None = Field(None, min_length=1, description="A system message that the writer reads, and that stays out of the row.")


STAGES: dict[str, type] = {"answer": Answer}


def stage_contradictions(do: str, settings: Any, temperature: float) -> Iterator[tuple[str, str]]:
    """Settings of a stage that are each valid, but not together: (setting, problem and fix)."""
    if temperature == 0 and getattr(settings, "samples", 1) > 1:
        yield "samples", f"found {settings.samples} with writer.temperature 0, where all would be the same; raise the temperature, or use 1"
