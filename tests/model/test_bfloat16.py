"""Loading and answering in bfloat16 on a CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText

TOLERANCE = 0.05
"""Of the largest logit: bfloat16 keeps 8 bits, so a rounding errs by up to 0.4 %, and some ten follow each other here."""


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize(
    "fusion", [{"type": "igva"}, {"type": "mmfuser", "layers": [1, 2, -2], "num_heads": 4, "num_points": 2}]
)
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_logits_are_those_of_float32_within_rounding_and_tokens_come_out(tower, fusion, make_model, make_batch, tmp_path):
    model = make_model(tower, fusion=fusion)
    model.save_pretrained(tmp_path)
    inputs = without_labels(make_batch(model, length=16))
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected, found = model(**inputs), half(**inputs)
    assert found.logits.dtype == torch.bfloat16
    largest = expected.logits.abs().max().item()
    torch.testing.assert_close(found.logits.float(), expected.logits, atol=TOLERANCE * largest, rtol=0)
    if expected.fusion_weights is not None:
        assert found.fusion_weights.dtype == torch.float32
        torch.testing.assert_close(found.fusion_weights, expected.fusion_weights, atol=0.02, rtol=0)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 256}
    tokens = half.generate(**inputs, **options)
    assert tokens.shape == (2, 20)
    # Teacher-forced on what it said, float32 gives each token (almost) the highest logit too: a tie may fall the other way.
    rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(input_ids=tokens, **rest).logits[:, 15:-1]
    chosen = logits.gather(-1, tokens[:, 16:, None])[..., 0]
    assert (logits.amax(-1) - chosen <= TOLERANCE * largest).all()
