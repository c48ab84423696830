"""A small generated instruction corpus: facts of a toy world, numbers, opposites and short stories.

It needs no download, is the same on every machine, and has several correct wordings of most answers, so that a teacher's distribution
has more information than one label. `prose` states the facts (to pretrain base models on); `questions` asks about them, as conversations.
No held-out question is among the training questions or in the prose; its fact may be.
"""

import functools
import random
from collections.abc import Callable, Iterator

VERSION = 1
SIZES = {
    "questions": {"train": 6000, "validation": 400, "test": 400},
    "prose": {"train": 10000, "validation": 300},
    "kinds": {"train": 1200, "validation": 240},
}

_KINDS = {  # kind: (does, home, things with their colour and size)
    "bird": (
        "flies",
        "a nest",
        "robin:brown:small owl:grey:big crow:black:big finch:yellow:small swan:white:big parrot:green:big wren:brown:small gull:white:big",
    ),
    "fish": (
        "swims",
        "the sea",
        "cod:grey:big tuna:blue:big eel:black:big trout:brown:small herring:silver:small salmon:pink:big perch:green:small carp:yellow:big",
    ),
    "insect": (
        "crawls",
        "the garden",
        "ant:black:small bee:yellow:small beetle:black:small moth:grey:small wasp:yellow:small cricket:green:small fly:black:small ladybird:red:small",
    ),
    "farm animal": (
        "eats grass",
        "a stable",
        "cow:brown:big goat:white:small sheep:white:small horse:black:big donkey:grey:big pony:brown:small lamb:white:small ox:brown:big",
    ),
    "tree": (
        "grows",
        "the forest",
        "oak:green:big pine:green:big birch:white:big willow:green:big elm:brown:big maple:red:big cedar:green:big hazel:brown:small",
    ),
    "fruit": (
        "is eaten",
        "a bowl",
        "apple:red:small plum:blue:small lemon:yellow:small melon:green:big cherry:red:small pear:yellow:small grape:blue:small fig:purple:small",
    ),
    "tool": (
        "is used",
        "a box",
        "hammer:grey:big saw:silver:big nail:grey:small drill:black:big spade:brown:big file:grey:small rake:green:big screw:silver:small",
    ),
    "vehicle": (
        "moves",
        "the street",
        "car:red:big bus:yellow:big truck:blue:big tram:green:big bike:black:small scooter:red:small van:white:big cart:brown:small",
    ),
}
THINGS = {
    name: {"kind": kind, "does": does, "home": home, "colour": colour, "size": size}
    for kind, (does, home, things) in _KINDS.items()
    for name, colour, size in (thing.split(":") for thing in things.split())
}
_VALUES = {key: sorted({thing[key] for thing in THINGS.values()}) for key in ("kind", "does", "home", "colour", "size")}
OPPOSITES = [
    tuple(p.split("/"))
    for p in (
        "hot/cold big/small fast/slow old/new light/dark high/low wet/dry loud/quiet hard/soft early/late full/empty open/shut rich/poor long/short "
        "happy/sad clean/dirty strong/weak near/far thick/thin sweet/sour up/down left/right day/night young/aged brave/shy true/false warm/cool deep/shallow"
    ).split()
]
_NAMES = "Ann Ben Cleo Dan Eva Finn Gus Hana Ida Jon Kim Leo Mia Ned Olga Pia".split()
_OBJECTS = "ball cup book hat key coin drum kite lamp spoon".split()

Question = tuple[str, str, list[str]]  # the question, a short answer, wrong answers


def _thing(rng: random.Random) -> Question:
    name = rng.choice(list(THINGS))
    key, ask = rng.choice(
        [
            ("kind", "What kind of thing is a {}?"),
            ("kind", "Tell me what a {} is."),
            ("colour", "What colour is a {}?"),
            ("size", "Is a {} big or small?"),
            ("does", "What is known of a {}: what happens with it?"),
            ("home", "Where do you find a {}?"),
            ("colour", "Name the colour of a {}."),
        ]
    )
    right = THINGS[name][key]
    return ask.format(name), right, [v for v in _VALUES[key] if v != right]


def _opposite(rng: random.Random) -> Question:
    pair = rng.choice(OPPOSITES)
    word, right = pair if rng.random() < 0.5 else pair[::-1]
    ask = rng.choice(["What is the opposite of {}?", "Give me the opposite of {}.", "Which word means the reverse of {}?"])
    return ask.format(word), right, [w for p in OPPOSITES for w in p if w not in pair]


def _sum(rng: random.Random) -> Question:
    a, b = rng.randint(1, 12), rng.randint(1, 12)
    return rng.choice(["What is {} plus {}?", "Add {} and {}.", "How much is {} and {} together?"]).format(a, b), str(a + b), _near(a + b)


def _next(rng: random.Random) -> Question:
    n, after = rng.randint(1, 98), rng.random() < 0.5
    right = n + 1 if after else n - 1
    return (
        (
            f"Which number comes {'after' if after else 'before'} {n}?"
            if rng.random() < 0.5
            else f"Say the number {'after' if after else 'before'} {n}."
        ),
        str(right),
        _near(right),
    )


def _larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(1, 100), 2)
    larger = rng.random() < 0.5
    right, wrong = (max(a, b), min(a, b)) if larger else (min(a, b), max(a, b))
    return f"Which is {'larger' if larger else 'less'}, {a} or {b}?", str(right), [str(wrong)]


def _story(rng: random.Random) -> Question:
    names, objects = rng.sample(_NAMES, 3), rng.sample(_OBJECTS, 3)
    k = rng.randrange(3)
    told = " ".join(f"{n} has the {o}." for n, o in zip(names, objects, strict=True))
    if rng.random() < 0.5:
        return f"{told} Who has the {objects[k]}?", names[k], [n for n in names if n != names[k]]
    return f"{told} What does {names[k]} have?", f"the {objects[k]}", [f"the {o}" for o in objects if o != objects[k]]


def _near(n: int) -> list[str]:
    return [str(m) for m in range(max(0, n - 5), n + 6) if m != n]


SKILLS: list[Callable[[random.Random], Question]] = [_thing, _thing, _opposite, _sum, _next, _larger, _story]
_WORDINGS = ["It is {}.", "The answer is {}.", "{}.", "That would be {}."]


def rows(split: str, name: str = "questions", noise: float = 0.0) -> list[dict]:
    """The rows of a split. questions: {messages}, and for the test split also {choices, answer}; prose: {text, messages}; kinds: {text, label}, a
    sentence and the kind of the thing in it.

    noise   share of the answers of questions that are replaced by wrong ones of the same kind; each row then has {clean}, false where its
            answer was. Of two shares the larger one replaces the answers of the smaller one too, by the same.
    """
    from ...errors import UserError

    if split not in SIZES.get(name, {}):
        known = "; ".join(f"name: {n}, split: {' or '.join(s)}" for n, s in SIZES.items())
        raise UserError(f"builtin:skills: found name {name!r} with split {split!r}, expected {known}")
    if name == "prose":
        return [_told(sentences) for sentences in _prose(split)]
    if name == "kinds":
        return _of_kinds()[split]
    if noise:
        return _with_noise(question_splits()[split], split, noise)
    return [_conversation(question, split) for question in question_splits()[split]]


_SAID = (
    *(
        "{name} saw a {thing} today.",
        "Where is the {thing}, {name}?",
        "The {size} {thing} is not {name}'s.",
        "We told {name} of a {thing}.",
    ),
    *("Is {name}'s {thing} {colour}?", "{name} likes neither the rain nor the {thing}."),
)


@functools.cache
def _of_kinds() -> dict[str, list[dict]]:
    """Distinct sentences about things, divided into splits."""
    rng, found = random.Random("kinds"), {}
    while len(found) < sum(SIZES["kinds"].values()):
        thing = rng.choice(list(THINGS))
        own = THINGS[thing]
        found[rng.choice(_SAID).format(name=rng.choice(_NAMES), thing=thing, **own)] = own["kind"]
    every = [{"text": text, "label": kind} for text, kind in found.items()]
    train = SIZES["kinds"]["train"]
    return {"train": every[:train], "validation": every[train:]}


def _with_noise(questions: list[tuple[str, str, list[str], str]], split: str, noise: float) -> list[dict]:
    order = random.Random(f"noise {split}").sample(range(len(questions)), len(questions))
    wrong, out = set(order[: round(noise * len(questions))]), []
    for i, (asked, right, others, wording) in enumerate(questions):
        answer = random.Random(f"noise {asked}").choice(others) if i in wrong else right
        out.append(_conversation((asked, answer, others, wording), split) | {"clean": i not in wrong})
    return out


@functools.cache
def question_splits() -> dict[str, list[tuple[str, str, list[str], str]]]:
    """Distinct questions, shuffled once and divided into splits."""
    rng, seen, found = random.Random("skills"), set(), []
    while len(found) < sum(SIZES["questions"].values()):
        question, right, wrong = rng.choice(SKILLS)(rng)
        if question not in seen:
            seen.add(question)
            others = rng.sample(wrong, min(3, len(wrong)))
            found.append((question, right, others, rng.choice(_WORDINGS)))
    rng.shuffle(found)
    parts, start = {}, 0
    for split, size in SIZES["questions"].items():
        parts[split] = found[start : start + size]
        start += size
    return parts


def _conversation(question: tuple[str, str, list[str], str], split: str) -> dict:
    asked, right, others, wording = question
    messages = [{"role": "user", "content": asked}]
    if split != "test":
        return {"messages": [*messages, {"role": "assistant", "content": wording.format(right)}]}
    choices = sorted([right, *others], key=lambda c: random.Random(asked + c).random())
    return {"messages": messages, "choices": [f"It is {c}." for c in choices], "answer": choices.index(right)}


def _prose(split: str) -> Iterator[list[str]]:
    rng = random.Random(f"prose {split}")
    for _ in range(SIZES["prose"][split]):
        yield "\n".join(rng.choice(_SENTENCES)(rng) for _ in range(rng.randint(4, 8))).split("\n")


def _told(sentences: list[str]) -> dict:
    """The sentences as text, and as a conversation, so that a base model is trained on the tokens that begin a turn."""
    half = len(sentences) // 2
    turns = [{"role": "user", "content": " ".join(sentences[:half])}, {"role": "assistant", "content": " ".join(sentences[half:])}]
    return {"text": " ".join(sentences), "messages": turns}


def _about(rng: random.Random) -> str:
    name = rng.choice(list(THINGS))
    t = THINGS[name]
    return rng.choice(
        [
            f"A {name} is a {t['kind']}.",
            f"A {name} is a {t['size']} {t['kind']}.",
            f"The {name} is {t['colour']}.",
            f"A {t['colour']} {name} is a {t['kind']}.",
            f"A {name} {t['does']}.",
            f"You find a {name} in {t['home']}.",
            f"The {t['kind']} in {t['home']} is a {name}.",
            f"A {name} is {t['size']} and {t['colour']}.",
        ]
    )


def _about_words(rng: random.Random) -> str:
    pair = list(rng.choice(OPPOSITES))
    rng.shuffle(pair)
    return rng.choice(["The opposite of {} is {}.", "{} is the reverse of {}.", "What is not {} is {}."]).format(*pair)


def _about_numbers(rng: random.Random) -> str:
    a, b, n = rng.randint(1, 12), rng.randint(1, 12), rng.randint(1, 98)
    low, high = sorted(rng.sample(range(1, 100), 2))
    return rng.choice(
        [
            f"{a} plus {b} is {a + b}.",
            f"{a} and {b} together are {a + b}.",
            f"After {n} comes {n + 1}.",
            f"Before {n} comes {n - 1}.",
            f"{high} is larger than {low}.",
            f"{low} is less than {high}.",
        ]
    )


def _about_people(rng: random.Random) -> str:
    names, objects = rng.sample(_NAMES, 2), rng.sample(_OBJECTS, 2)
    told = [f"{n} has the {o}." for n, o in zip(names, objects, strict=True)]
    k = rng.randrange(2)
    return " ".join(told) + f" So {names[k]} is the one with the {objects[k]}."


def _asked(rng: random.Random) -> str:
    """A question and its answer with a line break between them. Held-out questions are never used."""
    while True:
        question, right, _ = rng.choice(SKILLS)(rng)
        if question not in _held_out():
            return f"{question}\n{rng.choice(_WORDINGS).format(right)}"


@functools.cache
def _held_out() -> set[str]:
    return {question for split in ("validation", "test") for question, *_ in question_splits()[split]}


_SENTENCES = [_about, _about, _about_words, _about_numbers, _about_people, _asked, _asked, _asked]


_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]


def tokenizer():
    """A byte-level BPE tokenizer trained on the corpus, with single digits and a chat template. The same every time."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(_ROLES),
        chat_template=template,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def _trained() -> str:
    """The tokenizer's file, cached because training it takes a moment."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", *_ROLES]
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [row["text"] for row in rows("train", "prose")[:3000]]
    texts += [m["content"] for row in rows("train")[:3000] for m in row["messages"]]
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()
