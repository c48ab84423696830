"""Settings of the stages of `llmkd make`, by the name that `do:` has. No torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from .fields import Count, config_dataclass, path_to
from .make_keep import Keep, keep_contradictions, more_than_most
from .make_score import SCORES, Score, Select, score_contradictions, select_contradictions

OPERATIONS = ("add_constraint", "deepen", "concretise", "reasoning", "broaden")


def prompt_file() -> Any:
    return path_to("file", None, description="A text file of prompts that replaces llmkd's own, with the same sections and places.")


def least_words() -> Any:
    return Field(3, description="Shorter questions are rejected.")


def most_words() -> Any:
    return Field(150, description="Longer questions are rejected.")


@config_dataclass
class Answer:
    """The writer answers each row: sequence-level distillation, or labels for rows without answers."""

    samples: Count = Field(1, description="Answers to each row.")
    system: str | None = Field(
        None,
        min_length=1,
        description="A system message for the writer, placed before the row's own. It is not added to the row.",
    )


@config_dataclass
class Explain:
    """The writer answers each row under a system message that asks for explanations, which stays in the row (Orca)."""

    samples: Count = Field(1, description="Answers to each row, each under a different system message while there are enough.")
    system: tuple[str, ...] = Field(
        (), description="Sections of the prompt file from which the system messages are drawn; an empty list: all of them."
    )
    prompt: str | None = prompt_file()


@config_dataclass
class Expand:
    """New questions, from examples among the existing ones that the writer reads in each ask (Self-Instruct)."""

    count: Count = Field(description="Number of new questions.")
    in_context: Count = Field(8, description="Number of questions shown in each ask.")
    made_in_context: Annotated[int, Field(ge=0)] = Field(2, description="Number of these that are new questions, once there are that many.")
    per_ask: Count = Field(8, description="Number of new questions to request in each ask.")
    min_words: Count = least_words()
    max_words: Count = most_words()
    prompt: str | None = prompt_file()


@config_dataclass
class Topics:
    """New questions from a tree of topics, asked by personas."""

    topics: dict[str, Any] | tuple[str, ...] = Field(
        description="A list of topics, or a tree of mappings and lists whose leaves are asked about: {science: [physics, biology]}."
    )
    personas: tuple[str, ...] = Field((), description="Personas who ask; each asks about every leaf. An empty list: no persona.")
    subtopics: Annotated[int, Field(ge=0)] = Field(
        0, description="Number of narrower topics that the writer first names for each leaf; they become the leaves."
    )
    per_topic: Count = Field(4, description="Number of questions on each leaf by each persona.")
    min_words: Count = least_words()
    max_words: Count = most_words()
    prompt: str | None = prompt_file()


@config_dataclass
class Evolve:
    """Harder and rarer versions of the existing questions, with answers; changes that gain nothing are rejected (Evol-Instruct)."""

    rounds: Count = Field(1, description="Number of rounds; each changes the questions of the one before.")
    operations: tuple[Literal[OPERATIONS], ...] = Field(
        OPERATIONS,
        min_length=1,
        description="Ways to change a question; one is drawn for each question. broaden replaces it, the others make it harder.",
    )
    judge: bool = Field(True, description="Ask the writer whether a change has added anything, and reject it if not.")
    answers: bool = Field(True, description="Ask for the answers, and reject questions whose answer is a refusal or says nothing.")
    prompt: str | None = prompt_file()


@config_dataclass
class Paraphrase:
    """Each question in other words, with its answer unchanged."""

    samples: Count = Field(1, description="Number of paraphrases of each question.")
    prompt: str | None = prompt_file()


@config_dataclass
class BackTranslate:
    """Each question translated into another language and back, with its answer unchanged."""

    language: str = Field("German", min_length=1, description="Intermediate language.")
    own_language: str = Field("English", min_length=1, description="Language of the rows.")
    prompt: str | None = prompt_file()


@config_dataclass
class ReflectInstruction:
    """A better question with an answer, from each answered row: its version `instruction` (Selective Reflection-Tuning)."""

    prompt: str | None = prompt_file()


@config_dataclass
class ReflectResponse:
    """A better answer for each answered row: the version `response` of an original, or `both` of a reflected question."""

    prompt: str | None = prompt_file()


@config_dataclass
class Transcribe:
    """The writer, a speech recognition model, transcribes each sound (seeds of format speech)."""


STAGES: dict[str, type] = {
    "answer": Answer,
    "explain": Explain,
    "expand": Expand,
    "topics": Topics,
    "evolve": Evolve,
    "paraphrase": Paraphrase,
    "back_translate": BackTranslate,
    "reflect_instruction": ReflectInstruction,
    "reflect_response": ReflectResponse,
    "keep": Keep,
    "score": Score,
    "select": Select,
    "transcribe": Transcribe,
}

#: The stages that ask for no text. `--dry_run` passes all rows on from them, though they may leave some out.
WITHOUT_WRITER = ("keep", "score", "select")


def read_scores(do: str, settings: Any) -> Iterator[tuple[str, str]]:
    """(setting, column) of each score that a stage reads."""
    if do == "keep" and settings.teacher_ce is not None:
        yield "teacher_ce", "teacher_ce"
    if do == "select" and settings.rule == "reflection":
        yield from (("rule", "ifd"), ("rule", "rifd"))
    elif do == "select" and any(settings.by in columns for columns in SCORES.values()):
        yield "by", settings.by


_CONTRADICTIONS = {"keep": keep_contradictions, "score": score_contradictions, "select": select_contradictions}


def stage_contradictions(do: str, settings: Any, temperature: float | None) -> Iterator[tuple[str, str]]:
    """Contradictions of a stage's settings: (setting, problem and fix). `temperature`: the writer's, if there is one."""
    if do in _CONTRADICTIONS:
        yield from _CONTRADICTIONS[do](settings)
    if temperature == 0 and do in ("answer", "paraphrase") and settings.samples > 1:
        yield "samples", f"found {settings.samples} with writer.temperature 0, where all would be the same; raise the temperature, or use 1"
    if do in ("expand", "topics"):
        yield from more_than_most(settings)
    if do == "expand" and settings.made_in_context >= settings.in_context:
        yield "made_in_context", f"found {settings.made_in_context}, and in_context is {settings.in_context}; use less"
    if do == "topics" and (problem := _tree_problem(settings.topics)):
        yield "topics", problem


def _tree_problem(tree: Any) -> str | None:
    """The problems of a tree of topics."""
    if not tree:
        return "found none; name a topic"
    for value in tree.values() if isinstance(tree, dict) else ():
        if value is not None and not isinstance(value, dict | list | tuple):
            return f"found {value!r} below a topic, expected a list of topics, or a mapping"
        if value and (problem := _tree_problem(value)):
            return problem
    if not isinstance(tree, dict) and (bad := next((one for one in tree if not isinstance(one, str) or not one.strip()), None)) is not None:
        return f"found {bad!r}, expected the name of a topic"
    return None
