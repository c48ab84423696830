"""Settings of *keep*, a stage of `llmkd make`: the filters. No torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from .data import Source
from .fields import Count, OneOrMany, config_dataclass, path_to, with_setting_names
from .make_score import ScoringModel
from .where import where_contradictions

CLUSTERS = 100

Script = Literal[
    "latin", "cyrillic", "greek", "han", "hiragana", "katakana", "hangul", "arabic", "hebrew", "devanagari", "bengali", "tamil", "telugu",
    "thai", "georgian", "armenian", "ethiopic",
]  # fmt: skip


@config_dataclass
class Balance:
    """Kinds of rows, and the most that each may be of those that stay."""

    max_share: float = Field(gt=0, le=1, description="Largest share of a kind in the rows that stay; as many rows stay as possible.")
    column: str | None = Field(None, min_length=1, description="Column that names a row's kind; null: kinds are clusters of instructions.")
    clusters: Count | None = Field(None, description="Without a column: the number of clusters (100), by k-means.")
    on: Literal["words", "hidden"] | None = Field(
        None,
        description="Without a column: what is clustered. words (the default): TF-IDF of words and word pairs; hidden: the model's mean last "
        "hidden states.",
    )
    model: ScoringModel | None = Field(None, description="With on: hidden: the model.")
    batch_size: Count | None = Field(None, description="With on: hidden, number of instructions at a time (16).")


@config_dataclass
class HeldOutRows:
    """Rows of any columns, of which every text counts: data, or those that tasks of `llmkd eval` evaluate."""

    path: str | None = path_to(
        "data", None, description="A .json, .jsonl, .parquet, .arrow or .csv file, a folder of them, or a hub data set."
    )
    name: str | None = Field(None, description="Configuration of a hub data set.")
    split: str = Field("train", description="Split of a hub data set, or of a folder whose files are named by split.")
    revision: str | None = Field(None, description="Revision of a hub data set.")
    where: dict[str, Any] = Field(default_factory=dict, description="Rows that count, selected by their columns, as in data.train.")
    tasks: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Instead of a path: tasks in tasks_dir. The data of their test and validation splits count, questions and choices alike.",
    )
    tasks_dir: str | None = path_to("folder", None, description="With tasks: the folder of their task files, as for llmkd eval.")

    @property
    def source(self) -> Source:
        return Source(path=self.path, name=self.name, split=self.split, revision=self.revision, where=self.where)


@config_dataclass
class Keep:
    """Leaves out rows with bad, repeated, leaked or contradictory answers, each with its reason. Empty answers are always left out. The filters run in this order."""

    finish: Literal["stop", "any"] = Field(
        "any", description="stop: leave out answers that were cut off, did not end by themselves, or end in a colon."
    )
    min_words: Count | None = Field(
        None, description="Leave out answers of fewer words. In scripts without spaces each character is a word."
    )
    max_words: Count | None = Field(None, description="Leave out answers of more words.")
    refusals: bool = Field(False, description="true: leave out answers that begin like a refusal.")
    refusal_phrases: tuple[str, ...] | None = Field(
        None, min_length=1, description="With refusals: phrases that identify a refusal, instead of llmkd's own, which are English."
    )
    echo: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Leave out answers that equal their question or begin with it: minimum Jaccard index, such as 0.9 (at 0.8 answers that reuse "
        "the question's words are lost).",
    )
    repetition: float | None = Field(
        None,
        gt=1,
        description="Leave out answers with nine equal digits in a row, or with 1,000 characters that compress by more than this factor, such as "
        "Whisper's 2.4.",
    )
    repeated_words: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Leave out answers with more than this share of their words in sequences of ten words that occur twice.",
    )
    scripts: tuple[Script, ...] | None = Field(
        None, min_length=1, description="Leave out questions and answers that are not in these scripts."
    )
    script_share: float | None = Field(None, gt=0, le=1, description="With scripts: minimum share of letters in these scripts (0.9).")
    languages: tuple[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], ...] | None = Field(
        None,
        min_length=1,
        description="Leave out questions and answers that are not in these languages, by code: en, de, zh. Needs py3langid (the extra make).",
    )
    sums: bool = Field(False, description="true: leave out answers with a sum <<a=b>> that is wrong when recomputed.")
    contamination: OneOrMany[HeldOutRows] = Field(
        None,
        description="Held-out and evaluation rows: leave out rows with 13 words in a row in common with any of their texts, in whatever column.",
    )
    wer_below: float | None = Field(
        None,
        gt=0,
        description="Leave out transcripts with a word error rate of this or more against the row's own transcript, such as Distil-Whisper's 0.1; rows without one stay. "
        "Needs jiwer (the extra audio).",
    )
    wer_normaliser: Literal["none", "basic", "english"] | None = Field(
        None, description="With wer_below: normalisation of both texts, as in validation.error_rates (basic)."
    )
    agreement: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Of several answers to one question, keep those with the most frequent final answer, if this share or more of them have it.",
    )
    agreement_by: Literal["final", "words"] | None = Field(
        None,
        description="With agreement: what is compared. final (the default): the last number or line; words: keep an answer if its mean token F1 "
        "with the others is at least agreement.",
    )
    near_duplicate: float | None = Field(
        None,
        ge=0.1,
        le=1,
        description="Of rows with a Jaccard index of this or more, over strings of 5 characters, keep the first; such as 0.7.",
    )
    near_duplicate_of: Literal["question", "answer", "both"] | None = Field(
        None, description="With near_duplicate: the text to compare (question)."
    )
    teacher_ce: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Leave out rows whose column teacher_ce (of an earlier stage score) is above this quantile, such as 0.95.",
    )
    balance: Balance | None = Field(None, description="Leave out rows of kinds that are too frequent.")


#: Settings that need another one.
_PARTS = {
    "refusal_phrases": "refusals",
    "wer_normaliser": "wer_below",
    "script_share": "scripts",
    "agreement_by": "agreement",
    "near_duplicate_of": "near_duplicate",
}


def more_than_most(settings: Any) -> Iterator[tuple[str, str]]:
    """Contradictions of min_words and max_words: (setting, problem and fix)."""
    if settings.min_words and settings.max_words and settings.min_words > settings.max_words:
        yield "min_words", f"found {settings.min_words}, more than max_words ({settings.max_words}), so that nothing is left; swap them"


def keep_contradictions(settings: Keep) -> Iterator[tuple[str, str]]:
    """Contradictions of the stage's settings: (setting, problem and fix)."""
    for part, whole in _PARTS.items():
        if getattr(settings, part) is not None and not getattr(settings, whole):
            yield part, f"set without {whole}, to which it belongs; set {whole}, or leave it out"
    yield from more_than_most(settings)
    for setting, held_out in with_setting_names(settings.contamination, "contamination"):
        yield from ((f"{setting}.where.{path}".rstrip("."), problem) for path, problem in where_contradictions(held_out.where))
        yield from ((f"{setting}.{name}", problem) for name, problem in _path_or_tasks(held_out))
    if (balance := settings.balance) is None:
        return
    for name in ("clusters", "on", "model", "batch_size") if balance.column else ():
        if getattr(balance, name) is not None:
            yield f"balance.{name}", "set with balance.column, which names the kinds; leave one of them out"
    if not balance.column and balance.on == "hidden" and balance.model is None:
        yield "balance.model", "not given with on: hidden; name the model whose hidden states are clustered"
    for name in ("model", "batch_size") if balance.on != "hidden" and not balance.column else ():
        if getattr(balance, name) is not None:
            yield f"balance.{name}", "set without on: hidden, to which it belongs; leave it out"
    if not balance.column and balance.max_share * (balance.clusters or CLUSTERS) < 1:
        yield (
            "balance.max_share",
            f"found {balance.max_share:g}, and {balance.clusters or CLUSTERS} kinds can be no more than that each; raise it, or clusters",
        )


def _path_or_tasks(held_out: HeldOutRows) -> Iterator[tuple[str, str]]:
    if held_out.tasks is None:
        if held_out.path is None:
            yield "path", "not given; name the held-out rows, or tasks and the tasks_dir that has their files"
        if held_out.tasks_dir is not None:
            yield "tasks_dir", "set without tasks; name the tasks of it"
        return
    if held_out.tasks_dir is None:
        yield (
            "tasks_dir",
            "not given with tasks; name the folder of their task files (llmkd tasks writes one), or in the place of tasks the data themselves",
        )
    for name, default in (("path", None), ("name", None), ("split", "train"), ("revision", None), ("where", {})):
        if getattr(held_out, name) != default:
            yield name, "given with tasks, whose files name their data; leave one of the two out"
