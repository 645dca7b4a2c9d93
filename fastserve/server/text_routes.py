"""/tokenize and /detokenize: the tokenizer by itself. Must not know: generation."""

from __future__ import annotations

from fastserve.server.context import ServerContext
from fastserve.server.errors import invalid
from fastserve.server.prompts import chat_prompt, check_token_ids
from fastserve.server.protocol import DetokenizeRequest, TokenizeRequest
from fastserve.server.responses import DetokenizeResponse, TokenizeResponse


async def tokenize(body: TokenizeRequest, context: ServerContext) -> TokenizeResponse:
    """Answer POST /tokenize."""
    context.check_model(body.model)
    info = context.require_engine()
    tokenizer = context.require_tokenizer("prompt")
    if (body.prompt is None) == (body.messages is None):
        raise invalid("Either prompt or messages must be given.", "prompt")
    if body.messages is not None:
        prompt = await chat_prompt(
            body.messages,
            context,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            add_special_tokens=body.add_special_tokens,
            variables=body.chat_template_kwargs,
        )
        ids = prompt.token_ids
    else:
        text = body.prompt or ""
        adds = body.add_special_tokens is not False
        ids = await context.text_pool.run(len(text), lambda: tokenizer.encode(text, adds))
    spelled = None
    if body.return_token_strs:
        spelled = await context.text_pool.run(
            len(ids), lambda: [tokenizer.id_to_token(token_id) or "" for token_id in ids]
        )
    return TokenizeResponse(
        count=len(ids), max_model_len=info.max_model_len, tokens=ids, token_strs=spelled
    )


async def detokenize(body: DetokenizeRequest, context: ServerContext) -> DetokenizeResponse:
    """Answer POST /detokenize."""
    context.check_model(body.model)
    info = context.require_engine()
    tokenizer = context.require_tokenizer("tokens")
    check_token_ids(body.tokens, info.vocab_size, "tokens")
    return DetokenizeResponse(
        await context.text_pool.run(
            len(body.tokens), lambda: tokenizer.decode(body.tokens, skip_special_tokens=False)
        )
    )
