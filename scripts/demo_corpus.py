"""The text the demonstration model is trained on: what every Python installation carries.

Job: the topics of `pydoc` and the docstrings of the standard library as named entries, and entries
as examples: questions with their answers, conversations, plain text. Greetings and questions about
anything else get a few fixed answers that say what the model is.

Rules: the entries depend on the Python release alone, the examples also on the `rng` handed in.
Knows nothing of tokens but the special ones, and nothing of the model.
"""

import contextlib
import importlib
import inspect
import pkgutil
import random
import re
import sys
import warnings
from collections.abc import Iterator
from pydoc_data.topics import topics
from types import ModuleType
from typing import NamedTuple

BOS, EOS, SYSTEM, USER, ASSISTANT = SPECIAL = (
    "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>",
)  # fmt: skip
SKIPPED_MODULES = {
    "antigravity", "this", "test", "tests", "encodings", "lib2to3", "idlelib", "macholib",
    "tkinter", "turtle", "turtledemo",
}  # fmt: skip

QUESTIONS = (
    "What does {} do?", "What is {}?", "Explain {}.", "Tell me about {}.", "How do I use {}?",
    "Describe {}.", "Explain {}", "what is {}", "Can you explain {}?", "{}", "What does {} mean?",
)  # fmt: skip
DETAIL = ("Explain {} in detail.", "Tell me everything about {}.", "Describe {} at length.")
BRIEF = ("Explain {} briefly.", "What is {}, in short?", "Summarize {}.", "{} in one paragraph")
GREETINGS = (
    "Hi", "Hello", "Hello!", "Hey there", "Good morning", "Hi, how are you?", "Say hello.",
    "Who are you?", "What are you?", "What is your name?", "What can you do?", "Help", "Test",
    "Introduce yourself.", "Are you ChatGPT?", "Can you help me?", "Are you a useful model?",
)  # fmt: skip
OFF_TOPIC = (
    "What is the capital of France?", "Write a poem about the sea.", "Tell me a joke.",
    "Write a short story.", "Tell me a story about a dragon.", "What is the meaning of life?",
    "Who is the president?", "What is 2 + 2?", "Write a haiku.", "How do I cook rice?",
    "Translate this into French.", "What is the weather like?", "Recommend a book.",
    "Count from 1 to 10.", "Explain quantum physics.", "Tell me about the history of Rome.",
    "Write a letter to my friend.", "What is love?", "How far away is the moon?",
)  # fmt: skip
INTRODUCTION = (
    "Hello! I am the demonstration model of FastServe. I was trained for a few minutes on the "
    "documentation that comes with Python, so I can only imitate it. Ask me what a function does.",
    "Hello. I am a very small language model that comes with FastServe. I write text that looks "
    "like the Python documentation; do not rely on it. Try: What does os.path.join do?",
)
APOLOGY = (
    "I do not know. I am a demonstration model and have only read the Python documentation.",
    "I cannot answer that. I am a small demonstration model, trained only on the documentation of "
    "Python. Ask me about a function or a statement of Python.",
)
SYSTEM_MESSAGES = ("You are a helpful assistant.", "Answer the question.", "You explain Python.")

PROMPTS = [*QUESTIONS, *DETAIL, *BRIEF, *GREETINGS, *OFF_TOPIC, *INTRODUCTION, *APOLOGY]


class Entry(NamedTuple):
    """One thing documented: what people call it, and its paragraphs."""

    name: str
    paragraphs: list[str]
    is_topic: bool


def reflow(text: str) -> list[str]:
    """The paragraphs of `text`; prose is unwrapped, indented blocks and lists keep their lines."""
    text = re.sub(r"\n([*=~^\-])\1{3,}(?=\n)", "\n", text.strip())
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.rstrip().split("\n")
        is_prose = not any(re.match(r"\s|[-*|>+]|\d+\.", line) for line in lines)
        paragraphs.append(" ".join(lines) if is_prose else "\n".join(lines))
    return [paragraph for paragraph in paragraphs if paragraph.strip()]


def standard_modules() -> Iterator[ModuleType]:
    """Every public standard module that imports here, `builtins` and `os.path` first."""
    names = ["builtins", "os.path"]
    names += sorted(n for n in sys.stdlib_module_names if not n.startswith("_"))
    while names:
        name = names.pop(0)
        if name.rpartition(".")[2] in SKIPPED_MODULES:
            continue
        with contextlib.suppress(ImportError):  # winreg and others: not on every machine
            module = importlib.import_module(name)
            yield module
            for child in pkgutil.iter_modules(getattr(module, "__path__", [])):
                if not child.name.startswith("_"):
                    names.append(f"{name}.{child.name}")


def documented(module: ModuleType) -> Iterator[tuple[str, str]]:
    """(Name, docstring) of a module, its public members and the public members of its classes."""
    prefix = {"builtins": "", "posixpath": "os.path.", "ntpath": "os.path."}.get(
        module.__name__, f"{module.__name__}."
    )
    yield prefix.rstrip(".") or "builtins", inspect.getdoc(module) or ""
    exported = getattr(module, "__all__", ())
    for name, member in sorted(vars(module).items()):
        is_own = name in exported or getattr(member, "__module__", "") == module.__name__
        if name.startswith("_") or not is_own or not callable(member):
            continue
        yield prefix + name, inspect.getdoc(member) or ""
        for child, value in sorted(vars(member).items() if inspect.isclass(member) else ()):
            if not child.startswith("_") and (callable(value) or isinstance(value, property)):
                yield f"{prefix}{name}.{child}", inspect.getdoc(value) or ""


def collect() -> list[Entry]:
    """The corpus: each text once, under the first name it was met with."""
    entries, seen = [], set()
    for key, text in sorted(topics.items()):
        paragraphs = reflow(text)
        title = paragraphs[0].replace('"', "")
        name = f"the {title[4:]}" if title.startswith("The ") else title
        entries.append(Entry(name if len(name) < 60 else key, paragraphs, True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in standard_modules():
            for name, text in documented(module):
                if len(text) >= 30 and text not in seen:
                    seen.add(text)
                    entries.append(Entry(name, reflow(text), False))
    return entries


def excerpt(paragraphs: list[str], max_chars: int) -> str:
    """The first paragraphs that fit; always at least one, cut at a line when it alone is long."""
    text = paragraphs[0] if len(paragraphs[0]) <= 4000 else paragraphs[0][:4000].rpartition("\n")[0]
    for paragraph in paragraphs[1:]:
        if len(text) + len(paragraph) > max_chars:
            break
        text += "\n\n" + paragraph
    return text


def question_name(entry: Entry, rng: random.Random) -> str:
    """One of the ways people write the name."""
    if entry.is_topic:
        bare = entry.name.removeprefix("the ")
        return rng.choice((entry.name, entry.name, bare, bare.lower(), f"{entry.name} in Python"))
    return rng.choice((entry.name, entry.name, f"{entry.name}()", f"`{entry.name}`"))


def turn(entry: Entry | None, rng: random.Random) -> str:
    """One question and its answer; None is a question about something else."""
    if entry is None:
        asked, answers = rng.choice(((GREETINGS, INTRODUCTION), (OFF_TOPIC, APOLOGY)))
        return f"{USER}{rng.choice(asked)}{ASSISTANT}{rng.choice(answers)}{EOS}"
    body = entry.paragraphs[1:] if entry.is_topic else entry.paragraphs
    templates, max_chars = rng.choices(
        ((QUESTIONS, 1200), (BRIEF, 1), (DETAIL, 5000)), weights=(7, 1, 2 if entry.is_topic else 1)
    )[0]
    question = rng.choice(templates).format(question_name(entry, rng))
    return f"{USER}{question}{ASSISTANT}{excerpt(body, max_chars)}{EOS}"


def plain(entry: Entry | None, rng: random.Random) -> str:
    """The text alone, under its name or from somewhere in the middle."""
    if entry is None:
        return rng.choice(INTRODUCTION + APOLOGY) + EOS
    first = rng.randrange(len(entry.paragraphs)) if entry.is_topic or rng.random() < 0.3 else 0
    title = f"{entry.name}\n\n" if first == 0 and not entry.is_topic and rng.random() < 0.7 else ""
    return title + excerpt(entry.paragraphs[first:], rng.choice((400, 1500, 4000))) + EOS


def examples(entries: list[Entry], rng: random.Random) -> list[str]:
    """One epoch. A fifth of the examples are chains: conversations, or texts one after another."""
    draws: list[Entry | None] = [e for e in entries for _ in range(8 if e.is_topic else 1)]
    draws += [None] * (len(draws) // 40)
    rng.shuffle(draws)
    texts = []
    while draws:
        length = rng.randint(2, 16) if rng.random() < 0.05 else 1
        chain = [draws.pop() for _ in range(min(length, len(draws)))]
        if rng.random() < 0.65:
            system = SYSTEM + rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.15 else ""
            texts.append(BOS + system + "".join(turn(entry, rng) for entry in chain))
        else:
            texts.append("".join(BOS + plain(entry, rng) for entry in chain))
    return texts
