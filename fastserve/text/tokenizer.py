"""Text ↔ ids: the tokenizer, its special tokens, its chat template. The door of the text room.

Rules: what a model directory says of its tokenizer is read here and nowhere else; a file that
cannot be used is a ConfigError of one line. Must not know: HTTP, the engine, torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastserve.host.json_file import read_object
from fastserve.settings.option import ConfigError
from fastserve.text import byte_level_bpe, special_tokens
from fastserve.text.chat_renderer import ChatRenderer
from fastserve.text.chat_template import ChatTemplateError
from fastserve.text.content_guard import ContentGuard
from fastserve.text.template_files import (
    DEFAULT,
    WITH_TOOLS,
    read_template,
    read_templates,
)
from fastserve.text.text_stream import TextDelta, TextStream

logger = logging.getLogger(__name__)

__all__ = ["ChatPrompt", "TextDelta", "TextStream", "Tokenizer"]

NO_TEMPLATE = "This model has no chat template; --chat-template names one, completions need none."
OTHER_FORMATS = ("tokenizer.model", "*.model", "tekken.json", "*.tiktoken", "vocab.txt")
LONG_TEXT = 4096  # characters, or ids, from which work lets other threads run


class ChatPrompt(NamedTuple):
    """A conversation as a prompt."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """A Hugging Face fast tokenizer with its special tokens and chat template."""

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str],
        template: str | None,
        *,
        tool_template: str | None = None,
        other_special_tokens: Sequence[str] = (),
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)  # by name: "eos_token" → "</s>"
        self.other_special_tokens = tuple(other_special_tokens)  # that have no name
        backend.no_truncation()
        backend.no_padding()
        # Those that are special already would lose their flags.
        added = backend.get_added_tokens_decoder().values()
        special = {token.content for token in added if token.special}
        known = [text for text in special_tokens.values() if backend.token_to_id(text) is not None]
        backend.add_special_tokens([text for text in known if text not in special])
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.guard = ContentGuard(*guarded_texts(self._added.values()))
        self._chat = ChatRenderer(template, special_tokens) if template is not None else None
        self._tool_chat = self._chat
        if tool_template is not None:
            self._tool_chat = ChatRenderer(tool_template, special_tokens)
        decoder = b"" if backend.decoder is None else backend.decoder.__getstate__()
        self._byte_of_char = byte_alphabet() if b'"ByteLevel"' in decoder else None
        self._has_byte_tokens = b'"ByteFallback"' in decoder
        # As spelled in the vocabulary, which is no shorter than what it stands for in a text.
        self.longest_token_bytes = max(len(token.encode()) for token in backend.get_vocab())
        self._reference_id = self._find_reference()
        self._texts: dict[int, str] = {}

    @staticmethod
    def is_in(model_dir: Path) -> bool:
        """Whether a directory holds a tokenizer: tokenizer.json, or vocab.json and merges.txt."""
        names = byte_level_bpe.FILES
        return (model_dir / "tokenizer.json").is_file() or all(
            (model_dir / name).is_file() for name in names
        )

    @staticmethod
    def why_none(model_dir: Path) -> str:
        """Say what a directory without a tokenizer has in its place, and the way out."""
        files = f"neither tokenizer.json nor {byte_level_bpe.NAMES}"
        needed = f"{model_dir}: {files}, so only token ids can be prompts"
        others = [name for name in OTHER_FORMATS if any(model_dir.glob(name))]
        if not others:
            return f"{needed} (--tokenizer names another directory)"
        return (
            f"{needed}; {others[0].removeprefix('*')} is not read, but transformers makes "
            "tokenizer.json of it: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )

    @classmethod
    def load(cls, model_dir: Path, chat_template: str | None = None) -> Tokenizer:
        """Read a model directory; `chat_template` (a file, or a template) replaces its own.

        Raises ConfigError with one line when there is no usable tokenizer.
        """
        if not cls.is_in(model_dir):
            raise ConfigError(cls.why_none(model_dir))
        settings = read_settings(model_dir)
        added = read_object(model_dir / "added_tokens.json") or {}
        path = model_dir / "tokenizer.json"
        if path.is_file():
            try:
                backend = Backend.from_file(str(path))
            except Exception as error:  # the library raises plain Exception
                raise ConfigError(f"{path}: not a tokenizer: {error}") from error
            special_tokens.complete(backend, settings, added, model_dir)
        else:
            backend = byte_level_bpe.build(model_dir, settings, added)
        names = special_tokens.named_tokens(settings)
        templates = read_templates(model_dir, settings, chat_template)
        try:
            return cls(
                backend,
                names,
                templates.get(DEFAULT),
                tool_template=templates.get(WITH_TOOLS),
                other_special_tokens=special_tokens.listed_tokens(settings),
            )
        except ChatTemplateError as error:
            raise ConfigError(f"{model_dir}: {error}") from error

    def check_fits(self, vocab_size: int, source: Path) -> None:
        """Raise ConfigError for a tokenizer of another model: its vocabulary is larger than this.

        Single added tokens may be: a model that was never given them is served without.
        """
        num_plain = self.backend.get_vocab_size(with_added_tokens=False)
        if num_plain > vocab_size:
            raise ConfigError(
                f"{source}: the tokenizer has {num_plain} ids and the model {vocab_size}; "
                "--tokenizer names the directory of another"
            )
        unknown = [token.content for i, token in self._added.items() if i >= vocab_size]
        if unknown:
            logger.warning(
                "%s: the model knows none of %d added tokens, %r for one; prompts with them are "
                "refused", source, len(unknown), unknown[0],
            )  # fmt: skip

    @classmethod
    def find_eos(cls, model_dir: Path) -> int | None:
        """Return the id that ends a text by a directory's tokenizer; None: it has none of either.

        The vocabulary is only loaded where the id does not stand beside it.
        """
        if not cls.is_in(model_dir):
            return None
        settings = read_settings(model_dir)
        path = model_dir / "tokenizer.json"
        found = special_tokens.written_id(path, settings, "eos_token")
        is_named = special_tokens.token_text(settings.get("eos_token")) is not None
        return cls.load(model_dir).eos_token_id if found is None and is_named else found

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, if there is one."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if there is one."""
        return self._named_id("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; ValueError for what is no Unicode text."""
        try:
            if len(text) < LONG_TEXT:
                return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
            # Of the library's calls, only those for batches release the interpreter lock.
            batch = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            return batch[0].ids
        except TypeError as error:
            raise ValueError("A text must be Unicode; this one has lone surrogates.") from error

    def encode_spans(
        self, text: str, add_special_tokens: bool = True
    ) -> list[tuple[int, int] | None]:
        """Return which characters of `text` each id of `encode` stands for; None: it was added."""
        encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
        pairs = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        return [None if is_added else span for span, is_added in pairs]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; an id the tokenizer does not know has none."""
        if len(ids) < LONG_TEXT:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    @property
    def chat_template(self) -> str | None:
        """The source of the model's chat template."""
        return None if self._chat is None else self._chat.source

    def chat_renderer(
        self, template: str | None = None, *, has_tools: bool = False
    ) -> ChatRenderer:
        """Return what makes prompts of messages, by a given template or by the model's own."""
        if template is not None:
            return ChatRenderer(template, self.special_tokens)
        chat = self._tool_chat if has_tools else self._chat
        if chat is None:
            raise ChatTemplateError(NO_TEMPLATE)
        return chat

    def encode_chat(
        self,
        messages: Any,
        /,
        *,
        template: str | None = None,
        add_special_tokens: bool = False,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ChatPrompt:
        """Return the prompt for chat messages in OpenAI's shape; ValueError where there is none.

        The template writes the special tokens; `template` is one, or a file with one; `options`
        are those of ChatRenderer.render.
        """
        chosen = None if template is None else read_template(template)
        renderer = self.chat_renderer(chosen, has_tools=bool(variables and variables.get("tools")))
        marked = self.guard.mark(messages), self.guard.mark(variables)
        text = renderer.render(marked[0], variables=marked[1], **options)
        return self.chat_prompt(text, add_special_tokens)

    def chat_prompt(self, rendered: str, add_special_tokens: bool = False) -> ChatPrompt:
        """Return the prompt of a rendered conversation, in which content may be marked."""
        if self.guard.has_marks(rendered):
            cut = self.guard.cut(rendered)
            (encoding,) = self.backend.encode_batch(
                [cut.text], add_special_tokens=add_special_tokens
            )
            pairs = zip(encoding.ids, encoding.offsets, strict=True)
            ids = [token_id for token_id, span in pairs if span not in cut.separators]
        else:
            ids = self.encode(rendered, add_special_tokens)
        if not ids:
            raise ChatTemplateError("The chat template makes no prompt of these messages.")
        return ChatPrompt(self.guard.unmark(rendered), ids)

    def id_to_token(self, token_id: int) -> str | None:
        """Return the vocabulary's spelling of an id."""
        return self.backend.id_to_token(token_id)

    def token_text(self, token_id: int) -> str:
        """Return the text of one id as it reads inside a text, its leading space included."""
        text = self._texts.get(token_id)
        if text is None:
            if self._reference_id is None or token_id in self.special_ids:
                text = self.decode([token_id], skip_special_tokens=False)
            else:
                ids = [self._reference_id, token_id]
                prefix = self.decode(ids[:1], skip_special_tokens=False)
                text = self.decode(ids, skip_special_tokens=False)[len(prefix) :]
            self._texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one id, which may be part of a character."""
        token = self.id_to_token(token_id) or ""
        if self._byte_of_char is not None and token_id not in self._added:
            values = [self._byte_of_char.get(char) for char in token]
            if None not in values:
                return bytes(value for value in values if value is not None)
        if self._has_byte_tokens and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return self.token_text(token_id).encode()

    def _named_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def _find_reference(self) -> int | None:
        """Find an id with plain text, to put before a token whose own text is asked for."""
        for char in "abcdefghijklmnopqrstuvwxyz0123456789":
            token_id = self.backend.token_to_id(char)
            if token_id is not None and self.decode([token_id]) == char:
                return token_id
        return None


def guarded_texts(added: Iterable[AddedToken]) -> tuple[list[str], str]:
    """Return the texts of all special tokens, and of the one that can be put anywhere."""
    special = [token for token in added if token.special]
    plain = [t for t in special if not (t.single_word or t.lstrip or t.rstrip or t.normalized)]
    return [t.content for t in special], next((t.content for t in plain or special), "")


def byte_alphabet() -> dict[str, int]:
    """Return the characters by which byte-level vocabularies spell bytes (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): value for value in printable}
    table.update({chr(256 + index): value for index, value in enumerate(others)})
    return table


def read_settings(model_dir: Path) -> dict[str, Any]:
    """Return tokenizer_config.json's settings, and GPT-2's where its files are all there is."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings.update(read_object(model_dir / name) or {})
    if (model_dir / "tokenizer.json").is_file():
        return settings
    return {**settings, **byte_level_bpe.named_values(settings)}
