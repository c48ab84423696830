"""Evaluates runs and models with lm-evaluation-harness: its own tasks, prompts, metrics, few-shot examples and batches.

llmkd adds: models are loaded as they were trained, task data may lie in a local folder, each task has a record, nothing is evaluated
twice, truncated prompts are counted, and results of different settings are never mixed.
"""

import contextlib
import gc
import io
import json
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2

from llmkd import __version__
from llmkd.console import first_process, info, warn
from llmkd.errors import ChangedFiles, Stopped, UserError
from llmkd.training.shutdown import ShutdownRequest

from . import record_files
from .benchmarks import find_groups, find_tasks, harness_version, index, need_harness, shots
from .groups import write_groups
from .model_refs import ModelToEvaluate, find_models, tokenizer_of, weights_of
from .samples import in_words, items_of, record_of

CPU_BATCH = 8  # in place of "auto", which measures the size that fits into a GPU's memory


@dataclass(frozen=True)
class Options:
    fewshot: int | None = None  # None: each task's own number
    limit: int | None = None  # the first items only
    batch_size: int | str = "auto"
    seed: int | None = None  # None: the harness's own seeds
    dtype: str | None = None  # None: the type in which the model was trained or is saved
    force: bool = False  # evaluate tasks again that have a record
    chat_template: bool = False  # render prompts by the model's chat template, with few-shot examples as turns

    @property
    def seeds(self) -> dict[str, int]:
        own = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the harness's own
        return own if self.seed is None else dict.fromkeys(own, self.seed)


class SomeFailed(UserError):
    """Tasks that could not be evaluated; `records` has the others, {model: {task: record}}."""

    def __init__(self, problems: list[str], records: dict[str, dict[str, dict | None]]):
        super().__init__(*problems)
        self.records = {name: {task: record for task, record in one.items() if record} for name, one in records.items()}


def evaluate(model: Path | str, tasks: list[str], *, tasks_dir=None, out=None, allow_task_code=False, **options) -> dict[str, dict]:
    """{task: record} of one model, with new records and those that it already had. `options`: fields of `Options`."""
    return evaluate_all([str(model)], tasks, tasks_dir=tasks_dir, out=out, allow_task_code=allow_task_code, **options)[str(model)]


def evaluate_all(
    models: list[str], tasks: list[str], *, tasks_dir=None, out=None, allow_task_code=False, **options
) -> dict[str, dict[str, dict]]:
    """{model: {task: record}}. Wrong arguments are refused before a model is loaded. Rank 0 writes the files.

    If a task fails for one model, the others are still evaluated, and SomeFailed is raised at the end. Raises Stopped on a signal;
    finished evaluations are kept. Groups are recorded once all their tasks are there.
    """
    options = Options(**options)
    need_harness()
    with ShutdownRequest("leaving the evaluation") as stop:
        found_tasks = find_tasks(tasks, tasks_dir, options.fewshot, allow_task_code)
        found_models = find_models(list(dict.fromkeys(models)), out, options.dtype, options.chat_template)
        records = {ref.name: _known(ref, found_tasks, options) for ref in found_models}
        left = sum(record is None for of_model in records.values() for record in of_model.values())
        if left:
            from llmkd.training.launch import start

            work = _Work(found_tasks, options, start(), stop, left)
            for ref in found_models:
                work.evaluate(ref, records[ref.name])
        if first_process():
            groups = find_groups(tasks, tasks_dir, options.fewshot)
            for ref in found_models:
                write_groups(ref.out, groups, {name: record for name, record in records[ref.name].items() if record})
        if left and work.problems:
            raise SomeFailed(work.problems, records)
    return records


def _known(ref: ModelToEvaluate, tasks: dict, options: Options) -> dict[str, dict | None]:
    """{task: its record, or None if it is to be evaluated}. UserError for a record with other settings."""
    found, problems = {}, []
    for name, task in tasks.items():
        record = None if options.force else record_files.read_record(ref.out, name)
        if record is not None and not _whole(ref.out, name):
            warn(f"note: {ref.out / name}.jsonl is damaged; evaluating {name} again")
            record = None
        if record is not None:
            differ = record_files.differences(record, _settings(ref, task, options))
            if not differ and not _same_items(ref.out, name, task, options.limit):
                differ = ["the task's items have changed"]
            if differ:
                problems.append(
                    f"{ref.name}: {name} was evaluated with other settings ({'; '.join(differ)}); give those, another --out, or --force to replace it"
                )
            else:
                info(f"{ref.name}: {name} is evaluated already ({ref.out})")
        found[name] = record
    if problems:
        raise UserError(*problems)
    return found


def _whole(folder: Path, task: str) -> bool:
    try:
        return bool(record_files.read_items(folder, task))
    except (UserError, ValueError):
        return False


def _same_items(folder: Path, name: str, task, limit: int | None) -> bool:
    """Whether the items are still those that were evaluated, by the harness's own hash of each."""
    from lm_eval.utils import handle_non_serializable, hash_string

    def own(doc) -> str:
        return hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False))

    return {(i, own(doc)) for i, doc in task.doc_iterator(limit=limit)} == {
        (item["id"], item["hash"]) for item in record_files.read_items(folder, name)
    }


def _settings(ref: ModelToEvaluate, task, options: Options) -> dict:
    """The part of a record that is known before the evaluation."""
    return {
        "task": task.task_name,
        "version": task.VERSION,
        "harness": harness_version(),
        "llmkd": __version__,
        "fewshot": shots(task, options.fewshot),
        "limit": options.limit,
        "chat_template": options.chat_template or None,
        "seeds": options.seeds,
        "model": ref.identity,
    }


class _Work:
    """Runs the evaluations that are left, with one model in memory at a time."""

    def __init__(self, tasks: dict, options: Options, accelerator, stop: ShutdownRequest, left: int):
        self.tasks, self.options, self.accelerator, self.stop = tasks, options, accelerator, stop
        self.left, self.done, self.problems = left, 0, []

    def evaluate(self, ref: ModelToEvaluate, records: dict[str, dict | None]) -> None:
        """Fill in the records that are missing."""
        wanted = [name for name, record in records.items() if record is None]
        if not wanted:
            return
        self.check_stop()
        live = self.load(ref)
        for name in wanted:
            self.check_stop()
            try:
                records[name] = self.run(live, ref, name)
                self.done += 1
            except Stopped:
                raise self.stopped() from None
            except UserError as error:
                self.problems += [f"{ref.name}: {name}: {problem}" for problem in error.problems]
        del live
        gc.collect()
        if self.accelerator.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    def load(self, ref: ModelToEvaluate):
        """The model as it was trained, without the padding of its head, for the harness."""
        from llmkd.data.encoding.tokenizer import shared_vocab
        from llmkd.model_folder.files import rows_of
        from llmkd.models import adapters, pretrained

        files, device = ref.files, self.accelerator.device
        tokenizer = tokenizer_of(files, ref.name)
        shared_vocab(tokenizer, {ref.name: rows_of(files.config)})
        dtype = self.options.dtype or ref.settings.dtype
        model = pretrained.load_pretrained(files.base, ref.name, dtype, "auto", device, ref.settings.quantization)
        if files.adapter:
            model = adapters.load(model, files, ref.name).to(device)
        if weights_of(files) != ref.identity["fingerprint"]:
            raise ChangedFiles(f"{ref.name}: its files were changed after this command was started; start it again")
        batch = self.options.batch_size
        if str(batch).startswith("auto") and device.type == "cpu":
            batch = CPU_BATCH
        from .live_model import LiveModel

        return LiveModel(model.eval(), tokenizer, batch, self.accelerator, self.stop)

    def run(self, live, ref: ModelToEvaluate, name: str) -> dict:
        """Evaluates one task for one model, writes and reports the result. Returns the record on all processes."""
        import lm_eval

        started, options = time.monotonic(), self.options
        live.truncated, live.no_system = set(), False
        try:
            with contextlib.redirect_stdout(io.StringIO()), without_asides():  # the harness's notes on batch sizes
                found = lm_eval.simple_evaluate(
                    live,
                    tasks=[self.tasks[name]],
                    num_fewshot=options.fewshot,
                    limit=options.limit,
                    apply_chat_template=options.chat_template,
                    fewshot_as_multiturn=options.chat_template,
                    task_manager=index(None, False),  # else it would index all its tasks
                    **{f"{what}_random_seed" if what != "random" else "random_seed": seed for what, seed in options.seeds.items()},
                )
        except (AssertionError, ValueError, KeyError, IndexError, jinja2.TemplateError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise UserError(f"the harness cannot evaluate it ({type(error).__name__}: {reason})") from error
        record, problem = None, None
        if first_process():
            try:
                items = items_of(found["samples"][name], live.truncated)
                record = record_of(found, name, items, _settings(ref, self.tasks[name], options), time.monotonic() - started)
                record = record_files.write_task(ref.out, record, items)
                self.tell(record, items, live)
            except UserError as error:
                problem = str(error)
        record, problem = self.shared([record, problem])
        if problem:
            raise UserError(problem)
        return record

    def shared(self, values: list) -> list:
        """The values of the first process, on all processes."""
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(values)
        return values

    def tell(self, record: dict, items: list[dict], live) -> None:
        name, metrics = record["task"], "  ".join(f"{metric} {in_words(value)}" for metric, value in record["metrics"].items())
        info(
            f"[{self.done + 1}/{self.left}] {record['model']['path']}: {name}  {metrics}  ({record['n']} items, {record['seconds']:.0f} s)"
        )
        if record["truncated"]:
            truncated_items = sum(item["truncated"] for item in items)
            warn(
                f"warning: {name}: {record['truncated']} requests, of {truncated_items} of {len(items)} items, are longer than the model's context of "
                f"{live.max_length} tokens; the harness dropped their beginning, so the scores of those items mean little"
            )
        if live.no_system:
            warn(f"warning: {name}: the chat template takes no system message, so the task's description is left out of the prompts")

    def check_stop(self) -> None:
        if self.stop.any_rank(self.accelerator):
            raise self.stopped()

    def stopped(self) -> Stopped:
        return Stopped(f"stopped by a signal with {self.done} of {self.left} evaluations done; run the same command to continue")


def without_asides():
    """Keeps simple_evaluate from calling git (whose error is printed) and pip list after every task, for facts that llmkd's record does not have."""
    from unittest.mock import patch

    return patch.multiple("lm_eval.evaluator", create=True, get_git_commit_hash=lambda: None, add_env_info=lambda _: None)
