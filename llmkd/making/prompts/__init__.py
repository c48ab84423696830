"""Prompt files: sections of text with places, `{name}`, to be filled. No torch.

A section begins with its name in brackets on a line of its own, such as [user]; lines before the first one are notes. Braces that are no
place are ordinary characters.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, fix_of
from ...files import read_file
from ..rows import Message

_SECTION = re.compile(r"^\[([a-z_0-9]+)\][ \t]*$", re.MULTILINE)
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Prompts:
    """The sections of a file by name. `sha256`: of the file's content."""

    name: str
    sections: Mapping[str, str]
    sha256: str

    def text(self, section: str, **places: str) -> str:
        """A section with its places filled. Places in the inserted texts are not filled again."""
        if not places:
            return self.sections[section]
        pattern = "|".join(map(re.escape, places))
        return re.sub(rf"\{{({pattern})\}}", lambda found: places[found[1]], self.sections[section])

    def messages(self, section: str = "user", **places: str) -> tuple[Message, ...]:
        """The section as the user's turn, after the section `system` if there is one."""
        system = ({"role": "system", "content": self.sections["system"]},) if "system" in self.sections else ()
        return (*system, {"role": "user", "content": self.text(section, **places)})


NO_PROMPTS = Prompts("", {}, "")


def own_prompts(name: str) -> Path:
    """llmkd's own file of a stage."""
    return _FOLDER / f"{name}.txt"


def has_prompts(name: str) -> bool:
    return own_prompts(name).is_file()


def load_prompts(name: str, path: str | None, setting: str, places: Mapping[str, Collection[str]] | None = None) -> Prompts:
    """The prompts of a stage, from llmkd's own file or the user's.

    places   the places that each section must have, by section; by default those of llmkd's own file

    UserError if the file cannot be read, or lacks a section or a place.
    """
    own = given = _parse(own_prompts(name).name, read_file(own_prompts(name)), setting)
    if path is not None:
        try:
            given = _parse(path, read_file(path), setting)
        except OSError as error:
            raise UserError(f"{setting}: {path}: {error.strerror}; {fix_of(error, 'name a file of prompts')}") from error
    if places is None:
        places = {section: set(re.findall(r"\{([a-z_]+)\}", text)) for section, text in own.sections.items() if section != "system"}
    problems = []
    for section, names in places.items():
        if section not in given.sections:
            problems.append(f"{setting}: {given.name} has no section [{section}]; it has {', '.join(f'[{one}]' for one in given.sections)}")
        elif lacking := sorted(one for one in names if f"{{{one}}}" not in given.sections[section]):
            problems.append(f"{setting}: {given.name}: section [{section}] has no place {{{lacking[0]}}}; write it where the text belongs")
    if problems:
        raise UserError(*problems)
    return given


def _parse(name: str, raw: bytes, setting: str) -> Prompts:
    try:
        text = raw.decode("utf-8-sig")  # as Windows' editor writes it
    except UnicodeDecodeError as error:
        raise UserError(f"{setting}: {name}:{raw[: error.start].count(10) + 1}: not UTF-8; save the file as UTF-8") from None
    parts = _SECTION.split(text.replace("\r\n", "\n"))
    names = parts[1::2]
    if not names:
        raise UserError(f"{setting}: {name} has no section; begin one with its name in brackets on a line of its own, such as [user]")
    if twice := next((one for one in names if names.count(one) > 1), None):
        raise UserError(f"{setting}: {name} has the section [{twice}] twice; keep one")
    sections = dict(zip(names, (part.strip("\n").strip() for part in parts[2::2]), strict=True))
    if empty := next((one for one, part in sections.items() if not part), None):
        raise UserError(f"{setting}: {name}: section [{empty}] is empty; write its text, or remove it")
    return Prompts(name, sections, hashlib.sha256(raw).hexdigest())
