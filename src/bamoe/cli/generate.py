"""`bamoe generate`: continue a prompt."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bamoe.errors import CheckpointError, ConfigError


def generate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A dense model or a mixture: a directory, or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue; may be empty.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample with this temperature; 0 is greedy.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample among the likeliest of this mass.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams of a beam search.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the sampling.")] = 0,
) -> None:
    """Continue a prompt: greedily, or by sampling as soon as a temperature, top-k or top-p is given."""
    sampling = {
        name: value
        for name, value in (("temperature", temperature), ("top_k", top_k), ("top_p", top_p))
        if value is not None
    }
    if temperature == 0 and len(sampling) > 1:
        raise ConfigError("--temperature 0 is greedy: leave --top-k and --top-p out")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # the shell passed on bytes that are no UTF-8
        raise ConfigError(f"the prompt is not UTF-8 text: {error}") from error

    import torch

    from bamoe.checkpoints.loading import check_vocabulary, load_config, load_model, load_tokenizer

    on_gpu = torch.cuda.is_available()
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, load_config(model))
    network: Any = load_model(model, dtype="auto" if on_gpu else "float32").to("cuda" if on_gpu else "cpu")
    tokens = tokenizer(prompt)["input_ids"]
    if not tokens:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ConfigError("the tokenizer has no BOS or EOS token to start from; give a prompt")
        tokens = [start]
    longest, made_for = len(tokens) + max_new_tokens, getattr(network.config, "max_position_embeddings", None)
    if made_for is not None and longest > made_for:
        typer.echo(f"warning: this may take {longest} tokens; the model is made for {made_for}", err=True)
    inputs = torch.tensor([tokens], device=network.device)
    greedy = temperature == 0 or not sampling
    torch.manual_seed(seed)
    if not network(inputs[:, :1]).logits.isfinite().all():
        raise CheckpointError(f"{model}: its logits are NaN or infinite; train or save it again")
    output = network.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=not greedy,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **({} if greedy else {"top_k": 0, "top_p": 1.0, "temperature": 1.0} | sampling),
    )
    typer.echo(tokenizer.decode(output[0], skip_special_tokens=True))
