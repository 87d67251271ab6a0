"""The official recipe's step and ours, part by part; and the memory of the loss."""

from __future__ import annotations

from ..context import Context

MEASURES = """\
one training step (all its passes and AdamW) as the official recipe takes it, written plainly on the same transformers
(padded rows in random order, full logits, all hidden states kept, eager fusion), and with the parts of this package switched
on one by one: stage 1 of a 7B and stage 2 of a 1.1B language model behind CLIP-L/14-336, random weights, bf16, activation
checkpointing, 32 samples. Tokens per second, share of padding, peak memory beyond weights and optimizer, model FLOPs;
what the loop gives and what the kernels give, apart; every second layer checkpointed, none, compiled layers, Liger. And the
peak memory of the loss alone, from full logits and in chunks."""


def run_part(context: Context) -> None:
    """Record the loss alone, then every setup."""
    # The model and transformers are not to be imported for the sake of the other parts.
    from ..step_cases import run_part as run

    run(context)
