"""The tokenizer that `LLM.get_tokenizer()` returns: transformers' names, shapes and defaults.

Rules: what is here does what transformers' does with the same arguments, and what is not here is
not accepted. Chats are the exception: they go the way of `LLM.chat`, so that the ids are those the
model would get. Must not know: the engine, HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from fastserve.offline.batch_encoding import BatchEncoding, Tensors, as_arrays, plain_ids, rectangle
from fastserve.text.tokenizer import NO_TEMPLATE, Tokenizer

Padding = bool | Literal["longest", "max_length", "do_not_pad"]
NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip


class HFTokenizer:
    """A tokenizer with the attributes and methods of transformers' PreTrainedTokenizerFast."""

    is_fast = True
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, tokenizer: Tokenizer, name_or_path: str, model_max_length: int) -> None:
        self._tokenizer = tokenizer
        self._special_tokens: dict[str, str | None] = dict(tokenizer.special_tokens)
        self.name_or_path = name_or_path
        self.model_max_length = model_max_length
        self.padding_side = "right"
        self.truncation_side = "right"
        self.chat_template = tokenizer.chat_template

    # ── the vocabulary ───────────────────────────────────────────────────────────────────────

    @property
    def backend_tokenizer(self) -> Backend:
        """The `tokenizers` object behind it."""
        return self._tokenizer.backend

    @property
    def vocab_size(self) -> int:
        """The size of the vocabulary without added tokens; `len` counts them too."""
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._tokenizer.vocab_size

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Return every token's id, added tokens included."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        """The same as get_vocab()."""
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """Return the added tokens' ids, in their order."""
        return {token.content: i for i, token in sorted(self.added_tokens_decoder.items())}

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a token, or of each; an unknown one has the unknown token's, or None."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.backend_tokenizer.token_to_id(tokens)
        unknown = self._special_tokens.get("unk_token")
        if token_id is None and unknown is not None:
            return self.backend_tokenizer.token_to_id(unknown)
        return token_id

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the vocabulary's spelling of an id, or of each; None for an unknown one."""
        ids = plain_ids(ids)
        if isinstance(ids, int):
            return self._tokenizer.id_to_token(ids)
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._tokenizer.id_to_token(i) for i in ids if i not in skipped]

    # ── special tokens ───────────────────────────────────────────────────────────────────────

    def __getattr__(self, name: str) -> Any:
        """Return a special token, `eos_token`, or its id, `eos_token_id`; None where not set."""
        tokens: dict[str, str | None] = self.__dict__.get("_special_tokens", {})
        key = name.removesuffix("_id")
        if key not in NAMED_TOKENS and key not in tokens:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        token = tokens.get(key)
        return token if key == name or token is None else self.convert_tokens_to_ids(token)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a special token by its text or by its id."""
        key = name.removesuffix("_id")
        if key not in NAMED_TOKENS:
            super().__setattr__(name, value)
            return
        if key != name and value is not None:
            value = self.convert_ids_to_tokens(value)
        self._special_tokens[key] = value

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by name."""
        order = [
            *NAMED_TOKENS,
            *(name for name in self._special_tokens if name not in NAMED_TOKENS),
        ]
        found = ((name, self._special_tokens.get(name)) for name in order)
        return {name: token for name, token in found if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once: first those that have a name."""
        named = self.special_tokens_map.values()
        return list(dict.fromkeys([*named, *self._tokenizer.other_special_tokens]))

    @property
    def all_special_ids(self) -> Any:
        """Their ids."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Count the special tokens that encoding adds."""
        return self.backend_tokenizer.num_special_tokens_to_add(pair)

    # ── text to ids and back ─────────────────────────────────────────────────────────────────

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: Padding = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: Tensors | None = None,
        return_attention_mask: bool = True,
    ) -> BatchEncoding:
        """Return `input_ids` and `attention_mask`: lists for a text, lists of lists for several.

        `return_tensors` makes arrays ("np") or tensors ("pt") of [num_texts, length].
        """
        limit = None
        if truncation and truncation != "do_not_truncate":
            limit = self.model_max_length if max_length is None else max_length
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._ids(one, add_special_tokens, limit) for one in texts]
        width = self._width(rows, padding, max_length)
        made = rectangle(rows, width, self.pad_token_id, self.padding_side)
        if not return_attention_mask:
            del made["attention_mask"]
        if return_tensors is not None:
            return BatchEncoding(as_arrays(made, return_tensors))
        return BatchEncoding(
            {name: value[0] for name, value in made.items()} if isinstance(text, str) else made
        )

    def encode(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> Any:
        """Return the ids of a text; `options` are those of a call."""
        made = self(text, add_special_tokens=add_special_tokens, **options)
        return made["input_ids"]

    def tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[str]:
        """Return the tokens of a text as the vocabulary spells them."""
        ids = self._tokenizer.encode(text, add_special_tokens)
        return [self._tokenizer.id_to_token(i) or "" for i in ids]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Return the text of tokens."""
        decoder = self.backend_tokenizer.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> Any:
        """Return the text of an id or of a list of them; of lists, arrays or tensors, a list."""
        if clean_up_tokenization_spaces:
            raise ValueError("clean_up_tokenization_spaces is not supported.")
        ids = plain_ids(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list):
            return [self._tokenizer.decode(row, skip_special_tokens) for row in ids]
        return self._tokenizer.decode(ids, skip_special_tokens)

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Return the text of each list of ids."""
        rows = plain_ids(sequences)
        return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in rows]

    # ── chats ────────────────────────────────────────────────────────────────────────────────

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: Padding = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: Tensors | None = None,
        return_dict: bool = True,
        **variables: Any,
    ) -> Any:
        """Return the prompt of one conversation, or of each in a list.

        A BatchEncoding; only its ids with `return_dict=False`; text with `tokenize=False`.
        """
        chosen = self.get_chat_template(chat_template)
        is_own = chosen == self._tokenizer.chat_template
        renderer = self._tokenizer.chat_renderer(None if is_own else chosen, has_tools=bool(tools))
        is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
        texts = [
            renderer.render(
                one,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables={**variables, "tools": tools or None, "documents": documents},
            )
            for one in (conversation if is_batch else [conversation])
        ]
        given = texts if is_batch else texts[0]
        if not tokenize:
            return given
        made = self(
            given,
            add_special_tokens=False,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_tensors=return_tensors,
        )
        return made if return_dict else made["input_ids"]

    def get_chat_template(self, chat_template: str | None = None) -> str:
        """Return a given template, or the model's; ValueError where there is none."""
        chosen = self.chat_template if chat_template is None else chat_template
        if chosen is None:
            raise ValueError(NO_TEMPLATE)
        return chosen

    # ── parts of a call ──────────────────────────────────────────────────────────────────────

    def _ids(self, text: str, add_special_tokens: bool, limit: int | None) -> list[int]:
        """Return the ids of a text; with a limit, so few of them that special tokens fit too."""
        ids = self._tokenizer.encode(text, add_special_tokens)
        if limit is None or len(ids) <= limit:
            return ids
        backend = self.backend_tokenizer
        num_special = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        encoding = backend.encode(text, add_special_tokens=False)
        encoding.truncate(max(0, limit - num_special), direction=self.truncation_side)
        return backend.post_process(encoding, None, add_special_tokens).ids

    def _width(self, rows: list[list[int]], padding: Padding, max_length: int | None) -> int | None:
        """Return the length to pad to, if there is one."""
        if padding in (False, "do_not_pad"):
            return None
        if self.pad_token is None:
            raise ValueError("Padding needs a pad_token; set one: tokenizer.pad_token = ...")
        if padding == "max_length":
            return self.model_max_length if max_length is None else max_length
        return max(map(len, rows), default=0)
