"""Writes docs/settings.md, the list of every setting: `python docs/settings.py`. `tests/test_docs.py` compares it with the code."""

from pathlib import Path

from llmkd.config import schema
from llmkd.config.make import Make
from llmkd.config.make_stages import STAGES
from llmkd.config.recipe import Recipe
from llmkd.config.sweep import Sweep

HEAD = """\
# Settings

All settings of a recipe, of a sweep and of a file of `llmkd make`. `llmkd train --help all`, `llmkd sweep --help all` and `llmkd make --help all` print the same lists, and `llmkd train --help loss` prints one section.

- A setting is given in the YAML file, or on the command line by its dotted path (`--optim.lr 1e-4`).
- `null` means not given. [Paths](operations.md#paths) says what a path is relative to.
- `data.validation` and `data.choices` are sources, with the settings of `data.train`. `student.quantization` and `teacher.quantization` have the same settings.
- In a file of `llmkd make`, the models of the stages *keep* and *score* have the settings of `student` in *score*.

This page is written by `python docs/settings.py`.
"""
#: Sections whose settings are listed once, under another name.
SAME = {"data.validation.": "data.train.", "data.choices.": "data.train.", "seeds.": "data.train."}
SAME_OF_STAGES = ("teacher.", "balance.model.", "student.quantization.")


def shown(default) -> str:
    if default is ... or type(default).__name__ == "PydanticUndefinedType":
        return "required"
    return f"`{schema.dump_value(default)}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def tables(kind) -> list[str]:
    sections: dict[str, list[str]] = {}
    for path, type_, default, text in schema.describe(kind):
        if any(path.startswith(prefix) for prefix in SAME):
            continue
        section = path.split(".")[0] if "." in path or type_.startswith("a mapping of settings") else "general"
        sections.setdefault(section, []).append(f"| `{path}` | {cell(type_)} | {cell(shown(default))} | {cell(text)} |")
    head = ["", "| Setting | Values | Default | |", "|---|---|---|---|"]
    return [line for section, rows in sections.items() for line in ("", f"### {section}", *head, *rows)]


def stages() -> list[str]:
    """The settings of each stage of llmkd make."""
    out = []
    for do, kind in STAGES.items():
        rows = [
            f"| `{path}` | {cell(type_)} | {cell(shown(default))} | {cell(text)} |"
            for path, type_, default, text in schema.describe(kind)
            if not path.startswith(SAME_OF_STAGES)
        ]
        out += ["", f"### stage {do}", "", cell(kind.__doc__.splitlines()[0])]
        out += ["", "| Setting | Values | Default | |", "|---|---|---|---|", *rows] if rows else []
    return out


def page() -> str:
    return "\n".join(
        [
            HEAD.rstrip(),
            "",
            "## Of a recipe",
            *tables(Recipe),
            "",
            "## Of a sweep",
            *tables(Sweep),
            "",
            "## Of a file of llmkd make",
            *tables(Make),
            *stages(),
            "",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("settings.md").write_text(page(), encoding="utf-8")
