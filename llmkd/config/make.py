"""Settings of `llmkd make`: seeds, the writer and the stages that make data of them. No torch."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from ..errors import UserError
from . import loader, paths
from .data import Source
from .fields import Count, OneOrMany, Seed, as_tuple, config_dataclass, path_to, with_setting_names
from .formats import FORMATS
from .make_score import SCORES
from .make_sounds import reads_sounds, sound_contradictions
from .make_stages import STAGES, WITHOUT_WRITER, read_scores, stage_contradictions
from .overrides import override
from .served import SERVER_DEFAULTS, address_problem, env_name_problem
from .teacher import Attention, Dtype, Quantization, Teacher, loaded_by
from .validation import check, locator
from .yaml_loader import Dumper

#: The settings that only one kind of writer has.
_LOADED = ("revision", "base", "quantization", "dtype", "attention", "batch_size", "target_prefix")
_SERVED = ("api_key_env", "requests", "timeout", "patience", "body")
#: Fields of a request that settings of the writer fill, or that llmkd relies on.
_OWN_FIELDS = ("model", "messages", "temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of", "stream", "logprobs", "tools")
#: Other names of max_new_tokens; limit_tokens counts by that setting.
_LONGEST = ("max_completion_tokens", "max_output_tokens", "max_new_tokens", "n_predict", "num_predict")

#: Names that a secret may have; and arguments of a program that may contain one: an option with such an ending or with the secret after an equals
#: sign, a variable that is set to it (not to another variable), a header.
_SECRET = re.compile(r"key|authorization|secret|password|(^|[-_])token$", re.IGNORECASE)
_SECRET_ARGUMENT = re.compile(
    r"^-.*(api[-_]?key|secret|password|[-_](auth|access|api|hf)[-_]?token)(=|$)"
    r"|(?<![\w-])\w*(api_?key|_key|_token|secret|password)=(?![\"']?(\$|\s|$))|authorization: *(?![\"' ]|\w+ +\$)\S",
    re.IGNORECASE,
)


@config_dataclass
class Writer:
    """The model that writes: one that llmkd loads (model), one on a server, a program, or a file of recorded answers."""

    model: str | None = path_to(
        "model",
        None,
        description="Folder or hub id of a model, or of a LoRA adapter; with server or command: its name there.",
    )
    server: str | None = Field(
        None, description="Address of a server with OpenAI's chat completions (vLLM, llama.cpp, Ollama, vendors): http://host:port."
    )
    command: tuple[str, ...] | None = Field(
        None, min_length=1, description="A program and its arguments: it reads asks and writes answers as JSON lines."
    )
    recorded: str | None = path_to("file", None, description="A file of recorded answers, such as the answers.jsonl of an earlier run.")
    license: str | None = Field(None, min_length=1, description="The writer's terms for text that it writes; copied into the data card.")
    revision: str | None = Field(None, description="model: revision of a hub model or adapter.")
    base: str | None = path_to("model", None, description="model: for an adapter, the base, if it is not where adapter_config.json says.")
    quantization: Quantization | None = Field(None, description="model: load it in 4 or 8 bits; null: not quantised.")
    dtype: Dtype = Field("auto", description="model: dtype of the weights; auto: the dtype they were saved in.")
    attention: Attention = Field("auto", description="model: attention implementation; auto: the default of transformers.")
    batch_size: Count | None = Field(None, description="model: answers at a time (32; transcripts 8).")
    target_prefix: str | None = Field(
        None,
        description="model: for speech recognition, control tokens at the beginning of every transcript, such as "
        "<|de|><|transcribe|><|notimestamps|>; null: those of the tokenizer.",
    )
    api_key_env: str | None = Field(
        None, description="server: the environment variable that holds its key, which is written nowhere; null: no key is sent."
    )
    requests: Count | None = Field(None, description="server, command: maximum number of concurrent asks (8).")
    timeout: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="server, command: seconds that one answer may take (300)."
    )
    patience: Annotated[float, Field(ge=0, le=1e6)] | None = Field(
        None, description="server: seconds for which a request is retried while the server is gone or busy (600)."
    )
    body: dict[str, Any] = Field(
        default_factory=dict,
        description="server: further fields of each request, such as {chat_template_kwargs: {enable_thinking: false}}, or {max_tokens: null, "
        "max_completion_tokens: 512} for a server that uses another name; null leaves a field out.",
    )
    temperature: float = Field(0.0, ge=0, description="Temperature of sampling; 0: always the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the fewest tokens that have this share of the probability.")
    top_k: Count | None = Field(None, description="Sample from the k most likely tokens; null: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Sample from tokens that are at least min_p times as likely as the most likely one.")
    max_new_tokens: Count = Field(512, description="Longest answer in tokens; a longer one is cut off, and marked finish: length.")

    @property
    def kind(self) -> str:
        """local, api, command or recorded."""
        return "api" if self.server else "command" if self.command else "recorded" if self.recorded else "local"

    @property
    def loaded(self) -> Teacher:
        """The settings for loading a model that llmkd itself loads."""
        return loaded_by(self)

    def of_server(self, name: str) -> Any:
        """A setting of a server or a program, or its default."""
        value = getattr(self, name)
        return SERVER_DEFAULTS[name] if value is None else value


@config_dataclass
class Make:
    """Data that a model writes: stages over rows, one after another. What remains is train.jsonl, of format chat, or of format speech where seeds are."""

    output_dir: str = path_to("output", min_length=1, description="Folder of train.jsonl, rejected.jsonl, answers.jsonl and the data card.")
    writer: Writer | None = Field(None, description="The writer; null: none, and no stage may ask for text.")
    seed: Seed = Field(0, description="Seed of all random draws.")
    seeds: OneOrMany[Source] = Field(
        None, description="Rows to begin with: one source, or a list of sources, as in data.train. Their answers may be missing."
    )
    stages: tuple[dict[str, Any], ...] = Field(min_length=1, description="Stages in order, each with its name: {do: answer}.")
    limit_tokens: Count | None = Field(
        None,
        description="Maximum number of tokens of all asks and answers together, as the writer counts them; make stops before it exceeds this.",
    )
    max_rejected: float = Field(
        0.95, gt=0, le=1, description="Largest share of its candidates that a stage may reject. Above it make stops and prints the reasons."
    )


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """One stage: its number from 1, its name and its settings."""

    number: int
    do: str
    settings: Any

    @property
    def label(self) -> str:
        return f"{self.number}_{self.do}"

    @property
    def asks(self) -> bool:
        """Whether the stage asks the writer."""
        return self.do not in WITHOUT_WRITER


@dataclasses.dataclass(frozen=True)
class MakeSettings:
    """A file of `llmkd make`, checked, with its stages' settings read."""

    make: Make
    stages: tuple[StageSettings, ...]

    @property
    def sounds(self) -> bool:
        """Whether the rows are sounds, of format speech."""
        return reads_sounds(self.make)


def load_make(path: str | Path, overrides: dict[str, Any] | None = None, *, check_inputs: bool = False, written_later="") -> MakeSettings:
    """The checked settings of a file, whose paths are relative to it. UserError with every problem, one line each.

    check_inputs    refuse local models and files that do not exist
    written_later   a folder that earlier stages of a pipeline will write: paths in it may be missing
    """
    data, lines, problems = loader.read(path)
    changed = override(data, overrides or {}, problems)
    where = locator(str(path), lines, changed)
    loader.place_paths(Make, data, path, where, changed, problems)
    found = data.get("stages")
    own = {key: value for key, value in data.items() if key != "stages"}
    bare = [one if isinstance(one, dict) else {} for one in found] if isinstance(found, list) else found
    listed = found if isinstance(found, list) else []
    stages = tuple(_stage(number, one, path, lines, changed, problems) for number, one in enumerate(listed))
    make = check(Make, own | ({} if bare is None else {"stages": bare}), str(path), lines, problems, changed)
    problems = [f"{where(tuple(keys))}: {problem}" for keys, problem in _contradictions(make, stages)]
    if check_inputs:
        problems += _missing(make, path, where, written_later)
    if problems:
        raise UserError(*problems)
    written = tuple({"do": one.do} | dataclasses.asdict(one.settings) for one in stages)
    return MakeSettings(dataclasses.replace(make, stages=written), stages)


def _stage(index: int, found: Any, path, lines: dict, changed: set[tuple], problems: list[str]) -> StageSettings | None:
    """A stage's settings; their problems are added to `problems`."""
    line = lines.get(("stages", index), lines.get(("stages",)))
    place = f"{path}:{line}: stages.{index}"
    if not isinstance(found, dict) or not isinstance(found.get("do"), str):
        problems.append(f"{place}: names no stage; write it as {{do: answer}}; the stages are {', '.join(STAGES)}")
        return None
    do, given = found["do"], {key: value for key, value in found.items() if key != "do"}
    if do not in STAGES:
        near = difflib.get_close_matches(do, STAGES, 1, 0.6)
        problems.append(
            f"{place}.do: found {do}, which is no stage; " + (f"did you mean {near[0]}?" if near else f"the stages are {', '.join(STAGES)}")
        )
        return None
    here = {key[2:]: number for key, number in lines.items() if key[:2] == ("stages", index) and len(key) > 2}
    mine = {key[2:] for key in changed if key[:2] == ("stages", index)[: len(key)]}
    loader.place_paths(STAGES[do], given, path, locator(str(path), here, mine), mine, problems)
    try:
        return StageSettings(index + 1, do, check(STAGES[do], given, str(path), here, [], mine))
    except UserError as error:
        problems += [f"stages.{index} ({do}): {problem}" for problem in error.problems]
        return None


def _contradictions(make: Make, stages: tuple[StageSettings, ...]) -> Iterator[tuple[tuple, str]]:
    """Settings that are valid by themselves, but not together: (the keys of one of them, problem and fix)."""
    if make.writer is not None:
        yield from ((("writer", name), problem) for name, problem in _of_writer(make.writer))
    elif asking := next((stage for stage in stages if stage.asks), None):
        yield (
            ("writer",),
            f"not given, and the stage {asking.do} asks it; name the model that writes, or its server, a command, or a file of recorded answers",
        )
    for setting, source in with_setting_names(make.seeds, "seeds"):
        if (not FORMATS[source.format].is_text and source.format != "speech") or source.format == "text":
            yield (
                (*setting.split("."), "format"),
                f"found {source.format}, whose rows ask nothing; use alpaca, chat, prompt_completion or speech",
            )
        if source.weight != 1:
            yield (*setting.split("."), "weight"), f"found {source.weight:g}, and every seed is used once; leave it out"
    if not as_tuple(make.seeds) and stages[0].do != "topics":
        yield ("seeds",), f"not given, and the stage {stages[0].do} begins with rows; name them, or begin with the stage topics"
    yield from sound_contradictions(make, stages)
    unscored, scored = "", set()
    for stage in stages:
        for name, problem in stage_contradictions(stage.do, stage.settings, make.writer and make.writer.temperature):
            yield ("stages", stage.number - 1, *name.split(".")), problem
        if stage.do == "score":
            scored |= {column for score in stage.settings.scores for column in SCORES[score]}
        elif stage.asks:
            unscored, scored = stage.do, set()
        for name, column in read_scores(stage.do, stage.settings) if unscored else ():
            if column not in scored:
                fix = "add a stage score between"
                yield ("stages", stage.number - 1, name), f"reads {column}, which the rows that {unscored} makes do not have; {fix}"


def _of_writer(writer: Writer) -> Iterator[tuple[str, str]]:
    ways = [name for name in ("server", "command", "recorded") if getattr(writer, name) is not None]
    if len(ways) > 1:
        yield ways[1], f"given together with writer.{ways[0]}; keep one of them"
    if not ways and not writer.model:
        yield "model", "not given; name the model that writes, or its server, a command, or a file of recorded answers"
    if writer.recorded and writer.model:
        yield "model", "given with writer.recorded, which says itself who wrote; leave it out"
    if writer.server is not None:
        if problem := address_problem(writer.server):
            yield "server", problem
        if not writer.model:
            yield "model", "not given; name the model as the server serves it"
    if writer.api_key_env is not None and (problem := env_name_problem(writer.api_key_env)):
        yield "api_key_env", problem
    defaults = Writer(model="m")
    for names, belong, right in ((_LOADED, "a model that llmkd loads", not ways), (_SERVED, "writer.server", bool(writer.server))):
        for name in names:
            right_here = right or (writer.command is not None and name in ("requests", "timeout"))
            if getattr(writer, name) != getattr(defaults, name) and not right_here:
                yield name, f"set, but it belongs to {belong}; leave it out"
    for name in writer.body:
        if name in _OWN_FIELDS or (name == "max_tokens" and writer.body[name] is not None):
            own = {"max_tokens": "max_new_tokens"}.get(name, name)
            yield (
                "body",
                f"has {name}; "
                + (f"set writer.{own}" if hasattr(writer, own) else "llmkd sends it itself, or reads no such answer; leave it out"),
            )
    for name in _LONGEST:
        if writer.body.get(name) not in (None, writer.max_new_tokens):
            yield (
                "body",
                f"has {name}, which is not writer.max_new_tokens ({writer.max_new_tokens}), by which limit_tokens counts; give both one value",
            )
    if _holds_secret(writer.body):
        yield "body", "has what may be a key (not shown), which would be written into files; name its variable in writer.api_key_env"
    if any(_SECRET_ARGUMENT.search(argument) for argument in writer.command or ()):
        yield (
            "command",
            "has what may be a key (not shown), which would be written into files; let the program read it from the environment",
        )
    for name in ("top_p", "top_k", "min_p"):
        if writer.temperature == 0 and getattr(writer, name) != getattr(defaults, name):
            yield name, "set with temperature 0, which always takes the most likely token; leave it out, or raise the temperature"


def _holds_secret(found: Any, name: str = "") -> bool:
    """Whether a text in the value has a name that secrets have."""
    if isinstance(found, dict):
        return any(_holds_secret(value, str(name)) for name, value in found.items())
    if isinstance(found, list | tuple):
        return any(_holds_secret(one, name) for one in found)
    return isinstance(found, str) and bool(_SECRET.search(name))


def _missing(make: Make, path, where, written_later: str) -> list[str]:
    problems = []
    data = {key: value for key, value in json.loads(json.dumps(dataclasses.asdict(make))).items() if key != "stages"}
    if make.writer and make.writer.kind != "local":
        data["writer"] = {"recorded": make.writer.recorded}
    for mapping, key, keys, what in paths.paths_in(Make, data):
        later = written_later and Path(mapping[key]).absolute().is_relative_to(Path(written_later).absolute())
        if not later and (problem := paths.missing(mapping[key], what, str(Path(path).parent))):
            problems.append(f"{where(keys)}: {problem}")
    return problems


def dump_make(settings: MakeSettings, folder: str | Path | None = None) -> str:
    """The settings as YAML that `load_make` reads back to equal ones. Paths are written for a file in `folder`, or for one in any folder."""
    data = json.loads(json.dumps(dataclasses.asdict(settings.make)))
    data["stages"] = [{"do": one.do} | json.loads(json.dumps(dataclasses.asdict(one.settings))) for one in settings.stages]
    for kind, part in ((Make, {k: v for k, v in data.items() if k != "stages"}), *((STAGES[one["do"]], one) for one in data["stages"])):
        for mapping, key, _, what in paths.paths_in(kind, part):
            mapping[key] = paths.relative_to(mapping[key], what, folder)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False)
