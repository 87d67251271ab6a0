"""Code bases that exist, patched: the same numbers, everything named, nothing left behind."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from igva_kernels import dispatch, eager, patch

# The patched code sums in float32 and rounds once; the stand-ins run in float32, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def fusions(monkeypatch) -> list[str]:
    """The names of the implementations that were asked for, so that a patch that computes nothing shows.

    A call that repeats asks for none: it is noted as ``again``.
    """
    calls: list[str] = []
    resolve, fuse_again = dispatch.resolve, eager.fuse_again

    def counted(impl, *arguments):
        calls.append(impl)
        return resolve(impl, *arguments)

    def counted_again(*arguments):
        fused = fuse_again(*arguments)
        calls.extend(() if fused is None else ("again",))
        return fused

    monkeypatch.setattr(eager, "fuse_again", counted_again)
    for module in ("eager", "functional"):
        monkeypatch.setattr(f"igva_kernels.{module}.resolve", counted)
    return calls


def parameters_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---- official IGVA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["[[1,2],[3,4],[5,6],[7,8]]", "[[1,2,3],[4],[5,8]]"])
@pytest.mark.parametrize("average", [False, True])
def test_official_igva(make_igva, images, sentences, fusions, groups, average):
    model = make_igva(groups, average=average)
    expected = model.encode_images(images, sentences)
    wanted = torch.autograd.grad(expected.square().sum(), parameters_of(model))
    report = patch(model)
    patched = model.encode_images(images, sentences)
    torch.testing.assert_close(patched, expected, **CLOSE)
    for a, b in zip(torch.autograd.grad(patched.square().sum(), parameters_of(model)), wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert fusions
    assert [entry.method for entry in report.replaced] == ["OfficialIgva.encode_images"]


def test_one_sentence_holds_for_all_tiles(make_igva, images, sentences):
    model = make_igva()
    expected = model.encode_images(images, sentences[:1].expand(3, -1))
    with patch(model):
        torch.testing.assert_close(model.encode_images(images, sentences[:1]), expected, **CLOSE)


def test_a_missing_sentence_is_an_error_that_helps(make_igva, images):
    model = make_igva()
    patch(model)
    with pytest.raises(ValueError, match=r"sentence_embeds is None.*aggregate_by_average"):
        model.encode_images(images)


def test_siglip_under_official_igva_is_left_and_named(make_igva):
    model = make_igva()
    model.get_model().get_vision_tower().config.model_type = "siglip_vision_model"
    report = patch(model)
    assert not report.replaced
    assert "no CLS token" in str(report)


# ---- official DenseConnector --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("kind", ["sci", "dci"])
@pytest.mark.parametrize("video", [False, True])
def test_official_dense_connector(make_dense_connector, images, fusions, kind, siglip, video):
    model = make_dense_connector(kind, siglip)
    model.get_model().config.is_video = video
    expected = model.encode_images(images)
    report = patch(model)
    torch.testing.assert_close(model.encode_images(images), expected, **CLOSE)
    assert fusions and len(report.replaced) == 1


def test_token_integration_is_left_and_named(make_dense_connector):
    report = patch(make_dense_connector("sti"))
    assert not report.replaced and "tokens" in report.left[0].reason


# ---- deformable attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_deformable_attention_of_mmfuser_and_deformable_detr(make_deformable, coordinates, padded):
    model = make_deformable(16, n_levels=2, n_heads=4, n_points=3)
    shapes = torch.tensor([[3, 4], [2, 2]])
    starts = torch.tensor([0, 12])
    query, cells = torch.randn(2, 5, 16), torch.randn(2, 16, 16)
    reference = torch.rand(2, 5, 2, coordinates)
    mask = torch.rand(2, 16) < 0.3 if padded else None
    expected = model(query, reference, cells, shapes, starts, mask)
    wanted = torch.autograd.grad(expected.square().sum(), parameters_of(model))
    report = patch(model)
    patched = model(query, reference, cells, shapes, starts, mask)
    torch.testing.assert_close(patched, expected, **CLOSE)
    for a, b in zip(torch.autograd.grad(patched.square().sum(), parameters_of(model)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert [entry.method for entry in report.replaced] == ["MSDeformAttn.forward"]


def test_deformable_attention_of_transformers():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = MultiScaleDeformableAttention()

    layer = Layer()
    shapes = [(3, 4), (2, 2)]
    value, locations = torch.randn(2, 16, 4, 8), torch.rand(2, 5, 4, 2, 3, 2)
    weights = torch.rand(2, 5, 4, 2, 3)
    arguments = (value, torch.tensor(shapes), shapes, torch.tensor([0, 12]), locations, weights, 64)
    expected = layer.attn(*arguments)
    report = patch(layer)
    torch.testing.assert_close(layer.attn(*arguments), expected, **CLOSE)
    assert report.replaced[0].path == "attn"


# ---- transformers -------------------------------------------------------------------------------------------------------

VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
)
LANGUAGE_MODEL = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, vocab_size=100
)
IMAGE = 7


def make_llava(kind: str, layers):
    config_class, model_class = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
        "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration),
    }[kind]
    config = config_class(vision_config=VISION, text_config=LANGUAGE_MODEL, vision_feature_layer=layers, image_token_id=IMAGE)
    return model_class(config).eval()


def question() -> dict:
    input_ids = torch.tensor([[1, *[IMAGE] * 4, 5, 6], [1, *[IMAGE] * 4, 8, 9]])
    return {"input_ids": input_ids, "pixel_values": torch.randn(2, 3, 28, 28)}


@pytest.mark.parametrize("kind", ["llava", "vipllava"])
def test_layer_lists_of_transformers(kind, fusions):
    model = make_llava(kind, [-2, -3, 1])
    inputs = question()
    expected = model(**inputs).logits
    report = patch(model)
    ran = []
    handle = model.model.vision_tower.encoder.layers[-1].register_forward_hook(lambda *_: ran.append(True))
    torch.testing.assert_close(model(**inputs).logits, expected, **CLOSE)
    handle.remove()
    assert fusions
    assert not ran, "block 4 is not read"
    assert "stops after the last of them" in str(report)


@pytest.mark.parametrize("kind", ["llava", "vipllava"])
def test_gradients_reach_a_trained_tower(kind):
    model = make_llava(kind, [-2, 1])
    inputs = question()
    block = model.model.vision_tower.encoder.layers[0]
    expected = torch.autograd.grad(model(**inputs).logits.square().sum(), list(block.parameters()))
    patch(model)
    for a, b in zip(
        torch.autograd.grad(model(**inputs).logits.square().sum(), list(block.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_public_method_keeps_its_form():
    model = make_llava("llava", [-2, 1])
    pixels = torch.randn(2, 3, 28, 28)
    expected = model.model.get_image_features(pixels, return_dict=True)
    patch(model)
    patched = model.model.get_image_features(pixels, return_dict=True)
    assert type(patched) is type(expected)
    for a, b in zip(patched.pooler_output, expected.pooler_output, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    as_tuple = model.model.get_image_features(pixels, return_dict=False)
    torch.testing.assert_close(torch.stack(list(as_tuple[0])), torch.stack(list(expected.pooler_output)), **CLOSE)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # a single layer goes to the model's own method
        model.model.get_image_features(pixels, vision_feature_layer=-1, return_dict=True)


def test_a_single_layer_is_left_and_named():
    report = patch(make_llava("llava", -2))
    assert not report.replaced
    assert "single layer -2" in str(report)


# ---- the call itself ----------------------------------------------------------------------------------------------------


def test_undo_restores_every_method(make_igva, images, sentences):
    model = make_igva()
    before = dict(vars(model))
    with patch(model) as report:
        assert "encode_images" in vars(model) and report.replaced
    assert dict(vars(model)) == before
    report.undo()  # a second time does nothing


def test_a_method_that_the_object_had_of_its_own_comes_back(make_igva):
    model = make_igva()
    own = model.encode_images = lambda images, sentence_embeds=None: images
    patch(model).undo()
    assert model.encode_images is own


def test_a_patched_model_is_not_patched_twice(make_igva):
    model = make_igva()
    patch(model)
    report = patch(model)
    assert not report.replaced
    assert "patched already" in report.left[0].reason


def test_parts_of_a_larger_model_are_found_and_named(make_igva, make_deformable):
    model = nn.ModuleDict({"first": make_igva(), "second": nn.Sequential(make_deformable(16, 1, 2, 2))})
    assert {entry.path for entry in patch(model).replaced} == {"first", "second.0"}


def test_only_the_given_object_changes(make_igva, images, sentences):
    model = make_igva()
    twin = copy.deepcopy(model)
    patch(model)
    assert "encode_images" not in vars(twin)
    assert "encode_images" not in vars(type(model)) or not hasattr(type(model).encode_images, "_igva_kernels_patch")


def test_unknown_models_and_arguments_are_refused(make_igva):
    with pytest.raises(ValueError, match=r"nothing in this Linear is known"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        patch({})
    with pytest.raises(ValueError, match="impl must be one of"):
        patch(make_igva(), impl="cuda")
