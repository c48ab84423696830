"""Settings of the stages of `llmkd make`, by the name that `do:` has. No torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from .fields import Count, config_dataclass, path_to
from .make_keep import Keep, keep_contradictions, more_than_most
from .make_score import SCORES, Score, Select, score_contradictions, select_contradictions

OPERATIONS = ("add_constraint", "deepen", "concretise", "reasoning", "broaden")


def prompt_file() -> Any:
    return path_to("file", None, description="A text file of prompts in the place of llmkd's own, with the same sections and places.")


def least_words() -> Any:
    return Field(3, description="Shorter questions are rejected.")


def most_words() -> Any:
    return Field(150, description="Longer questions are rejected.")


@config_dataclass
class Answer:
    """The writer answers each row: sequence-level distillation, and labels for rows without answers."""

    samples: Count = Field(1, description="Answers to each row.")
    system: str | None = Field(
        None,
        min_length=1,
        description="A system message that the writer reads, before one that the row has, and that stays out of the row.",
    )


@config_dataclass
class Explain:
    """The writer answers each row under a system message that asks for explanations, which stays in the row (Orca)."""

    samples: Count = Field(1, description="Answers to each row, each under another system message as far as there are some.")
    system: tuple[str, ...] = Field(
        (), description="Sections of the prompt file from which the system messages are drawn; an empty list: all of them."
    )
    prompt: str | None = prompt_file()


@config_dataclass
class Expand:
    """New questions from those that are there, some of which the writer reads in each ask (Self-Instruct)."""

    count: Count = Field(description="New questions that are wanted.")
    in_context: Count = Field(8, description="Questions that are shown in each ask.")
    made_in_context: Annotated[int, Field(ge=0)] = Field(2, description="Of these, how many are new ones, once there are so many.")
    per_ask: Count = Field(8, description="New questions that each ask wants.")
    min_words: Count = least_words()
    max_words: Count = most_words()
    prompt: str | None = prompt_file()


@config_dataclass
class Topics:
    """New questions from a tree of topics, and from personas that ask them."""

    topics: dict[str, Any] | tuple[str, ...] = Field(
        description="Topics: a list, or a tree of mappings and lists, whose leaves are asked about: {science: [physics, biology]}."
    )
    personas: tuple[str, ...] = Field((), description="Who asks; every leaf is asked about by each of them. An empty list: anybody.")
    subtopics: Annotated[int, Field(ge=0)] = Field(
        0, description="Narrower topics that the writer first names for each leaf, which then are the leaves."
    )
    per_topic: Count = Field(4, description="Questions on each leaf by each persona.")
    min_words: Count = least_words()
    max_words: Count = most_words()
    prompt: str | None = prompt_file()


@config_dataclass
class Evolve:
    """Harder and rarer questions from those that are there, with their answers; what gains nothing is eliminated (Evol-Instruct)."""

    rounds: Count = Field(1, description="Rounds: each changes what came out of the one before.")
    operations: tuple[Literal[OPERATIONS], ...] = Field(
        OPERATIONS,
        min_length=1,
        description="Ways to change a question, of which one is drawn for each: four make it deeper, broaden replaces it.",
    )
    judge: bool = Field(True, description="Ask the writer whether a change has added anything, and eliminate it where it has not.")
    answers: bool = Field(True, description="Ask for the answers, and eliminate questions whose answer is a refusal or says nothing.")
    prompt: str | None = prompt_file()


@config_dataclass
class Paraphrase:
    """Each question in other words, with the answer that it has."""

    samples: Count = Field(1, description="Paraphrases of each question.")
    prompt: str | None = prompt_file()


@config_dataclass
class BackTranslate:
    """Each question translated into another language and back, with the answer that it has."""

    language: str = Field("German", min_length=1, description="The language between.")
    own_language: str = Field("English", min_length=1, description="The language of the rows.")
    prompt: str | None = prompt_file()


@config_dataclass
class ReflectInstruction:
    """A better question, and its answer, from each answered row: the version `instruction` of it (Selective Reflection-Tuning)."""

    prompt: str | None = prompt_file()


@config_dataclass
class ReflectResponse:
    """A better answer to each answered row: the version `response` of an original, and `both` of a reflected question."""

    prompt: str | None = prompt_file()


@config_dataclass
class Transcribe:
    """The writer, a model of speech recognition, writes a transcript of each sound (seeds of format speech)."""


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

#: Those that ask for no text. `--dry_run` takes the rows past them: they are then at most as many.
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
    """Settings of a stage that are each valid, but not together: (setting, problem and fix). `temperature`: the writer's, if there is one."""
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
    """What is wrong with a tree of topics."""
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
