"""Presets against the code of transformers, run on small random models."""

import pytest
import torch

from igva_kernels import FusionPlan, fuse
from igva_kernels.modules import VipLlavaFusion, columns_to_blocks, columns_to_interleaved

transformers = pytest.importorskip("transformers")


def _vision_config(num_layers):
    return transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=num_layers, num_attention_heads=2, image_size=8, patch_size=4
    )


def _text_config():
    return transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=32
    )


def _states_and_projected(model, **options):
    """The tower's hidden states, and what transformers hands to the first layer of its projector and gets from it."""
    seen = []
    first = next(iter(model.multi_modal_projector.children()))
    handle = first.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        model.get_image_features(pixels, **options)
        states = model.vision_tower(pixels, output_hidden_states=True).hidden_states
    handle.remove()
    ((given, got),) = seen
    return states, given, got


@pytest.mark.parametrize("vision_feature_layer", [-2, [-2, -5, 3], [0, -1]], ids=str)
def test_llavas_list_of_layers(vision_feature_layer):
    config = transformers.LlavaConfig(
        vision_config=_vision_config(6), text_config=_text_config(), vision_feature_layer=vision_feature_layer
    )
    model = transformers.LlavaModel(config).eval()
    states, features, _ = _states_and_projected(model, vision_feature_select_strategy="default")
    plan = FusionPlan.layers(6, model.config.vision_feature_layer)
    assert torch.equal(fuse(states, plan, num_prefix_tokens=1), features)


@pytest.mark.parametrize("plan", [FusionPlan.vip_llava(12), FusionPlan.dense_connector_sci(24)], ids=["vip_llava", "sci"])
def test_a_tower_that_keeps_only_what_the_plan_reads(plan):
    model = transformers.CLIPVisionModel(_vision_config(plan.num_layers)).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        every = model(pixels, output_hidden_states=True).hidden_states
        some = model(pixels, output_hidden_states=list(plan.sources)).hidden_states
    assert [index for index, state in enumerate(some) if state is not None] == list(plan.sources)
    assert torch.equal(fuse(some, plan, num_prefix_tokens=1), fuse(every, plan, num_prefix_tokens=1))


def test_vip_llavas_layers_and_its_norm():
    config = transformers.VipLlavaConfig(vision_config=_vision_config(12), text_config=_text_config())
    model = transformers.VipLlavaModel(config).eval()
    theirs = model.multi_modal_projector.projector_layernorm
    torch.nn.init.normal_(theirs.weight)
    torch.nn.init.normal_(theirs.bias)
    states, features, normalised = _states_and_projected(model)
    plan = FusionPlan.vip_llava(12)
    assert torch.equal(fuse(states, plan, num_prefix_tokens=1), features)
    ours = VipLlavaFusion(plan, 8, eps=config.projector_layernorm_eps)
    ours.load_state_dict({f"projector_layernorm.{name}": value for name, value in theirs.state_dict().items()})
    with torch.no_grad():
        # Sums of 40 channels in another order: a few roundings of values near 1.
        torch.testing.assert_close(ours(states, num_prefix_tokens=1), normalised, rtol=1e-5, atol=1e-5)


def test_mllamas_final_state_and_interleaved_layers():
    from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

    config = MllamaVisionConfig(
        hidden_size=8,
        num_hidden_layers=4,
        num_global_layers=1,
        attention_heads=2,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0, 2, 3],
        vision_output_dim=32,
    )
    model = MllamaVisionModel(config).eval()
    seen = []
    for encoder in (model.transformer, model.global_transformer):
        encoder.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        published = model(
            torch.randn(1, 1, 1, 3, 8, 8), torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.long)
        ).last_hidden_state
    local, final = seen
    plan = FusionPlan.mllama(4, intermediate_layers=config.intermediate_layers_indices)
    blocks = fuse((None, *local.hidden_states, final.last_hidden_state), plan, num_prefix_tokens=0)
    patches = published.shape[-2]  # transformers pads the tokens to a multiple of 8 and cuts them again
    assert torch.equal(columns_to_interleaved(blocks, 3)[:, :patches], published[0, 0])
    assert torch.equal(blocks[:, :patches], columns_to_blocks(published[0, 0], 3))
