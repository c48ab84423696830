"""Settings of *score* and *select*, stages of `llmkd make`. No torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, config_dataclass, path_to
from .teacher import Attention, Dtype, Quantization, Teacher, loaded_by

#: {score: the columns of a row that hold it}.
SCORES = {"ce": ("ce",), "ifd": ("ce", "ce_alone", "ifd"), "rifd": ("rifd",), "teacher_ce": ("teacher_ce",), "kl": ("kl",)}
OF_TEACHER = ("teacher_ce", "kl")

Share = Annotated[float, Field(ge=0, le=1)]


@config_dataclass
class ScoringModel:
    """A model that llmkd loads to read rows."""

    model: str = path_to("model", description="Folder or hub id of a model, or of a LoRA adapter.")
    revision: str | None = Field(None, description="Revision of a hub model or adapter.")
    base: str | None = path_to("model", None, description="For an adapter, the base, if it is not where adapter_config.json says.")
    quantization: Quantization | None = Field(None, description="Load it in 4 or 8 bits; null: not quantised.")
    dtype: Dtype = Field("auto", description="dtype of the weights; auto: the dtype they were saved in.")
    attention: Attention = Field("auto", description="Attention implementation; auto: the default of transformers.")

    @property
    def loaded(self) -> Teacher:
        """The settings for loading it."""
        return loaded_by(self)


@config_dataclass
class Score:
    """Scores each row with a model, as columns: cross-entropy, IFD, r-IFD, a teacher's cross-entropy, a divergence."""

    student: ScoringModel = Field(description="The model that will learn from the rows, before training.")
    teacher: ScoringModel | None = Field(None, description="For teacher_ce and kl: a model with the student's tokens.")
    scores: tuple[Literal[tuple(SCORES)], ...] = Field(
        ("ifd",),
        min_length=1,
        description="ce: mean cross-entropy of the answer's tokens in their context; ifd: exp(ce - cross-entropy of the same tokens alone); rifd:"
        " the same for the instruction, after a prompt that shows the answer and asks for its instruction; teacher_ce: the teacher's "
        "ce; kl: KL(teacher || student).",
    )
    format: Literal["chat", "alpaca"] = Field(
        "chat",
        description="How the models read a row. chat: in the tokenizer's chat template; alpaca: in the prompt of Stanford Alpaca, for models "
        "without a chat template.",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(2048, description="Longest row in tokens; a longer one gets no score.")
    too_long: Literal["reject", "refuse"] = Field(
        "reject", description="What to do with rows that cannot be scored, such as too long ones. reject: reject them; refuse: stop."
    )
    batch_size: Count = Field(16, description="Rows at a time.")
    prompt: str | None = path_to(
        "file", None, description="rifd: a text file of prompts that replaces llmkd's own, with the same sections and places."
    )


@config_dataclass
class Select:
    """Keeps rows by their scores, or the version of each row that Selective Reflection-Tuning's rule chooses."""

    rule: Literal["score", "reflection"] = Field(
        "score", description="score: select rows by one column; reflection: select one version of each row, by ifd and rifd."
    )
    by: str | None = Field(None, min_length=1, description="score: the column, such as ifd. It must hold a number in every row.")
    above: float | None = Field(None, description="score: keep rows above it.")
    below: float | None = Field(None, description="score: keep rows below it.")
    top: float | None = Field(None, gt=0, le=1, description="score: then keep this share of rows, those with the highest scores.")
    middle: Annotated[tuple[Share, Share], Field()] | None = Field(
        None, description="score: then keep the rows between these two shares, ordered by score: [0.25, 0.75] is the middle half."
    )
    per_cluster: Count | None = Field(None, description="score: then keep this many rows, spread evenly over the order of the score.")
    clusters: Count | None = Field(
        None,
        description="score: apply top, middle and per_cluster within each of this many clusters of instructions (k-means on TF-IDF), not to all "
        "rows.",
    )
    originals: Literal["keep", "drop"] = Field(
        "keep",
        description="reflection: drop leaves out all rows without a reflected response, as the authors' program does.",
    )


def score_contradictions(settings: Score) -> Iterator[tuple[str, str]]:
    """Contradictions of the stage's settings: (setting, problem and fix)."""
    needing = [name for name in settings.scores if name in OF_TEACHER]
    if needing and settings.teacher is None:
        yield "teacher", f"not given, and {needing[0]} is a score of it; name the teacher, or leave {needing[0]} out"
    if settings.teacher is not None and not needing:
        yield "teacher", "given, and no score is of it; add teacher_ce or kl to scores, or leave it out"
    if settings.prompt is not None and "rifd" not in settings.scores:
        yield "prompt", "given, and it belongs to the score rifd; leave it out"
    if twice := next((name for name in settings.scores if settings.scores.count(name) > 1), None):
        yield "scores", f"names {twice} twice"


def select_contradictions(settings: Select) -> Iterator[tuple[str, str]]:
    limits = [name for name in ("above", "below", "top", "middle", "per_cluster") if getattr(settings, name) is not None]
    if settings.rule == "reflection":
        for name in ("by", *limits, *(["clusters"] if settings.clusters else [])):
            if getattr(settings, name) is not None:
                yield name, "set with rule: reflection, which reads ifd and rifd and has no limits but 1; leave it out"
        return
    if settings.originals != "keep":
        yield "originals", "set without rule: reflection; leave it out"
    if settings.by is None:
        yield "by", "not given; name the column of the score, such as ifd"
    if not limits:
        yield "by", "given without a limit; add above, below, top, middle or per_cluster"
    if settings.clusters and not {"top", "middle", "per_cluster"} & set(limits):
        yield "clusters", "set without top, middle or per_cluster, which hold in each cluster; leave it out"
    if settings.above is not None and settings.below is not None and settings.above >= settings.below:
        yield "above", f"found {settings.above:g}, which is not below {settings.below:g} (below); no number is between them"
    if settings.middle is not None and settings.middle[0] >= settings.middle[1]:
        yield "middle", f"found {list(settings.middle)}; the first share must be the smaller one"
