"""python recipes/on_policy/own_text.py [--config RECIPE] [--samples N] TEACHER RUN [RUN ...]

What finished runs write to held-out prompts, and how far that is from the teacher: TEACHER is its adapter or model. RECIPE, which has on_policy, gives
the held-out rows and the longest answer; without it they are the quickstart's 400 questions. Results go to RUN/eval/own_text.json and .jsonl, as
those of an evaluation's task: `llmkd compare RUN RUN --tasks own_text` compares them prompt by prompt. Needs the extra eval.

reverse_kl       KL(student || teacher) of the whole answer, in nats: the sum over its tokens of the exact KL at each, whose expectation it is; the
                 mean of N answers to each prompt, sampled at temperature 1, as are all below
forward_kl       the sum over the same tokens of KL(teacher || student)
..._per_token    these two over the tokens of the answers to the prompt, a mean over prompts; a step's loss is a mean over tokens
length, finished tokens, and whether it ended by itself
rouge_l          ROUGE-L of the answer to the data's own (F1 of the longest common subsequence of stemmed words), 0 to 1
right            of the quickstart's questions: the most likely answer says what is right, in any of the data's wordings
right_sampled    the same of the sampled answers
"""

import argparse
import re
from pathlib import Path

import numpy as np

TASK = "own_text"
WORDING = re.compile(r"(?:It is |The answer is |That would be )?(.*)\.")
BETTER = {"right": True, "right_sampled": True, "reverse_kl": False, "forward_kl": False, "length": None, "finished": True, "rouge_l": True}
BETTER |= {f"{name}_per_token": False for name in ("reverse_kl", "forward_kl")}
RECIPE = Path(__file__).resolve().with_name("on_policy.yaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=RECIPE, help="recipe whose held-out prompts are answered")
    parser.add_argument("--samples", type=int, default=2, help="answers to each prompt")
    parser.add_argument("teacher", type=Path, help="folder of the teacher's adapter or model")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs")
    options = parser.parse_args()
    if options.samples < 1:
        parser.error(f"--samples: found {options.samples}, expected a whole number >= 1")
    from llmkd_eval.harness.model_refs import weights_of
    from llmkd_eval.harness.record_files import write_task

    from llmkd.cli import quiet
    from llmkd.config.loader import load_recipe
    from llmkd.data.reading.skills import question_splits
    from llmkd.model_folder.files import find, student_folder
    from llmkd.models.load import LoadContext, load_teacher
    from llmkd.models.saved_student import as_trained
    from llmkd.teachers.live import LiveTeacher
    from llmkd.training.launch import start
    from llmkd.training.prepare import prepare
    from llmkd.training.validate import Evaluator

    quiet()
    students = {run: student_folder(str(run)) for run in options.runs}
    first = next(iter(students.values()))
    changes = {"student.model": str(first), "teacher.model": str(options.teacher), "on_policy.validation_prompts": 1}
    recipe = load_recipe(options.config, changes)
    prepared, accelerator, longest = prepare(recipe), start(), recipe.on_policy.max_new_tokens
    context = LoadContext(prepared.vocab, accelerator.device)
    teacher = LiveTeacher(load_teacher(as_trained(options.teacher), context))
    evaluator = Evaluator(accelerator, 64)
    conditions = f"{options.samples} of at most {longest} tokens, teacher {weights_of(find(str(options.teacher), 'TEACHER'))}"
    rows = np.flatnonzero(prepared.validation_prompts.may).tolist()
    right = [answer for _, answer, _, _ in question_splits()["validation"]] if options.config.resolve() == RECIPE else None
    if right and not len(right) == len(rows) == len(prepared.validation):
        raise SystemExit("the held-out rows are not the questions whose answers are known")
    for run, folder in students.items():
        student = load_teacher(as_trained(folder), context)
        values = measured(student, teacher, prepared, evaluator, rows, options.samples, longest, right)
        items = [
            {"id": i, "hash": prepared.validation.student_hash(i), "metrics": {name: float(of_E[k]) for name, of_E in values.items()}}
            for k, i in enumerate(rows)
        ]
        metrics = {
            name: {"value": float(of_E.mean()), "stderr": float(of_E.std(ddof=1) / len(rows) ** 0.5), "higher_is_better": BETTER[name]}
            for name, of_E in values.items()
        }
        write_task(run / "eval", {"task": TASK, "version": conditions, "n": len(items), "metrics": metrics}, items)
        print(f"{run.name}: " + "  ".join(f"{name} {one['value']:.4f}" for name, one in metrics.items()), flush=True)


def measured(
    student, teacher, prepared, evaluator, rows: list[int], samples: int, longest: int, right: list[str] | None
) -> dict[str, np.ndarray]:
    """Each metric of `samples` answers of at most `longest` tokens to each of the held-out `rows`, [rows]."""
    from llmkd.data.written import answered
    from llmkd.rollouts.sampling import Sampling
    from llmkd.rollouts.writer import text_key
    from llmkd.training.writing import local_writer

    data, prompts = prepared.validation, prepared.validation_prompts
    writer, asked = local_writer(student, prepared, 200), prompts.ids(data, rows)

    def text(ids) -> str:
        return prepared.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def is_right(ids: tuple[int, ...], answer: str) -> bool:
        found = WORDING.fullmatch(text(ids))
        return bool(found) and found[1] == answer

    def mean(of: list) -> np.ndarray:
        return np.array(of, float).reshape(samples, len(rows)).mean(0)

    keys = [text_key(TASK, data.content_hash(i), sample) for sample in range(samples) for i in rows]
    written = writer.write(asked * samples, keys, Sampling(1.0, longest))
    texts = answered(data, prompts, rows * samples, [one.ids for one in written]).unweighted()
    (found,) = evaluator.validate([student], teacher, texts)
    divergences = {name: mean(found.sums[name]) for name in ("reverse_kl", "forward_kl")}
    length = mean([len(one.ids) for one in written])
    own = [text(first_answer(*data.example(i))) for i in rows] * samples
    values = {
        **divergences,
        **{f"{name}_per_token": of_E / length for name, of_E in divergences.items()},
        "length": length,
        "finished": mean([one.finished for one in written]),
        "rouge_l": mean(rouge_l(own, [text(one.ids) for one in written])),
    }
    if right:
        greedy = writer.write(asked, [0] * len(rows), Sampling(0.0, longest))
        values["right"] = np.array([is_right(one.ids, answer) for one, answer in zip(greedy, right, strict=True)], float)
        values["right_sampled"] = mean([is_right(one.ids, answer) for one, answer in zip(written, right * samples, strict=True)])
    return values


def rouge_l(answers: list[str], written: list[str]) -> list[float]:
    """ROUGE-L of each text to the answer in its place, 0 to 1; words are stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(answer, text)["rougeL"].fmeasure for answer, text in zip(answers, written, strict=True)]


def first_answer(ids: np.ndarray, mask: np.ndarray) -> list[int]:
    """The tokens of an example's first run of targets. `ids`, `mask`: [tokens]."""
    start = int(mask.argmax())
    end = start + int(np.append(mask[start:], False).argmin())
    return ids[start:end].tolist()


if __name__ == "__main__":
    main()
