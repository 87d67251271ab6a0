"""MoL's routing, token by token in plain loops, and what fuse makes of it."""

import math

import pytest
import torch

from igva_kernels import FusionPlan, fuse
from igva_kernels.modules import MixtureOfLayersRouter

LAYERS, WIDTH, TEXT, TOP = 6, 8, 5, 2


@pytest.fixture
def states():
    return [torch.randn(2, 5, WIDTH, dtype=torch.float64) for _ in range(LAYERS + 1)]


@pytest.fixture
def text():
    return torch.randn(2, TEXT, dtype=torch.float64)


def make_router(level, **options):
    router = MixtureOfLayersRouter(
        FusionPlan.mixture_of_layers(LAYERS), WIDTH, TEXT, level=level, top_k=TOP, key_dim=7, **options
    ).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router


def published(router, level, states, text):
    """The mixed map (B, N, D), from q, k and s as the paper writes them; layers 1..L, the reserve layer h_{L-1}."""
    images = []
    for image in range(2):
        query = router.query.weight @ text[image]

        def distribution(tokens, query=query):
            """softmax over the layers for tokens (L, D)."""
            keys = tokens @ router.key_weight.T
            return (keys @ query / math.sqrt(7) / router.temperature).softmax(0)

        patches = torch.stack([state[image, 1:] for state in states[1:]])  # (L, N, D)
        of_image = distribution(patches.mean(1))
        tokens = []
        for n in range(patches.shape[1]):
            of_patch = distribution(patches[:, n])
            probabilities = {"layer": of_image, "patch": of_patch}.get(level)
            if level == "hybrid":
                beta = torch.sigmoid(router.blend.weight[0] @ text[image] + router.blend.bias[0])
                probabilities = of_image ** (1 - beta) * of_patch**beta
                probabilities = probabilities / probabilities.sum()
            top = probabilities.topk(TOP)
            mixed = sum(value * patches[layer, n] for value, layer in zip(*top, strict=True)) / top.values.sum()
            if level == "hybrid":
                divergence = (of_patch * (of_patch.log() - of_image.log())).sum()
                gamma = torch.sigmoid(router.reserve_gate.weight[0, 0] * divergence + router.reserve_gate.bias[0])
                mixed = (1 - gamma) * mixed + gamma * patches[LAYERS - 2, n]
            tokens.append(mixed)
        images.append(torch.stack(tokens))
    return torch.stack(images)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("level", ["layer", "patch", "hybrid"])
def test_routing_and_mix_equal_the_formulas_with_all_gradients(level, temperature, impl, states, text):
    router = make_router(level, temperature=temperature, impl=impl)
    leaves = [*router.parameters(), text.requires_grad_(), *(state.requires_grad_() for state in states[1:])]
    routing = router(states, text, num_prefix_tokens=1)
    out = fuse(states, router.plan, routing.weights, num_prefix_tokens=1, impl=impl)
    expected = published(router, level, states, text)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    cotangent = torch.randn_like(expected)
    got, want = (torch.autograd.grad(result, leaves, cotangent) for result in (out, expected))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("level", "entries", "of_tokens"), [("layer", 2, False), ("patch", 2, True), ("hybrid", 3, True)])
def test_what_the_routing_holds(level, entries, of_tokens, states, text):
    routing = make_router(level)(states, text, num_prefix_tokens=1)
    values, indices = routing.weights
    assert values.shape == indices.shape == (2, 4, entries)
    assert values.is_contiguous() and indices.is_contiguous()
    torch.testing.assert_close(values.sum(-1), torch.ones(2, 4, dtype=torch.float64))
    assert routing.probabilities.shape == ((2, 4, LAYERS) if of_tokens else (2, LAYERS))
    torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones_like(routing.probabilities[..., 0]))
    assert (routing.reserve_gates is not None) == (level == "hybrid")
    if level == "hybrid":
        assert (indices[..., -1] == LAYERS - 2).all()  # h_{L-1} is column L - 2
        assert torch.equal(values[..., -1], routing.reserve_gates)


def test_blend_and_gate_start_at_one_half(states, text):
    router = MixtureOfLayersRouter(FusionPlan.mixture_of_layers(LAYERS), WIDTH, TEXT).double()
    assert torch.equal(router(states, text, num_prefix_tokens=1).reserve_gates, torch.full((2, 4), 0.5, dtype=torch.float64))


@pytest.mark.parametrize("level", ["layer", "patch", "hybrid"])
def test_prefix_tokens_are_not_scored(level, states, text):
    router = make_router(level)
    expected = router(states, text, num_prefix_tokens=1)
    for state in states:
        state[:, 0] = float("nan")
    assert torch.equal(router(states, text, num_prefix_tokens=1).weights.values, expected.weights.values)


def test_a_reserve_layer_by_name(states, text):
    router = make_router("hybrid", reserve=2)
    assert (router(states, text, num_prefix_tokens=1).weights.indices[..., -1] == 1).all()


def test_states_in_bfloat16_give_weights_in_float32(states, text):
    router = make_router("hybrid").float()
    narrow = [state.bfloat16() for state in states]
    routing = router(narrow, text, num_prefix_tokens=1)
    assert routing.weights.values.dtype == torch.float32
    assert fuse(narrow, router.plan, routing.weights, num_prefix_tokens=1).dtype == torch.bfloat16


@pytest.mark.parametrize("level", ["layer", "patch", "hybrid"])
def test_compiled_in_one_graph_equals_eager(level, states, text):
    router = make_router(level)

    def run(states, text):
        return fuse(states, router.plan, router(states, text, num_prefix_tokens=1).weights, num_prefix_tokens=1)

    parameters = list(router.parameters())
    expected = run(states, text)
    want = torch.autograd.grad(expected.square().sum(), parameters)
    out = torch.compile(run, fullgraph=True, backend="aot_eager")(states, text)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(out.square().sum(), parameters), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


PLAN = FusionPlan.mixture_of_layers(LAYERS)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixtureOfLayersRouter(PLAN, level="token"), "level.*'patch'.*'token'"),
        (lambda: MixtureOfLayersRouter(PLAN, top_k=7), "top_k must be 1 .. 6.*7"),
        (lambda: MixtureOfLayersRouter(PLAN, top_k=0), "top_k"),
        (lambda: MixtureOfLayersRouter(FusionPlan.igva(6, 2)), "single.*mixture_of_layers"),
        (lambda: MixtureOfLayersRouter(FusionPlan.llava(6)), "mixture_of_layers"),
        (lambda: MixtureOfLayersRouter(PLAN, reserve=0), "reserve: layer 0 is none of"),
        (lambda: MixtureOfLayersRouter(PLAN, reserve=9), "reserve: layer 9 does not exist"),
        (lambda: MixtureOfLayersRouter(PLAN, 8, 5)([None] * 7, torch.zeros(2, 4), num_prefix_tokens=1), r"\(2, 4\).*5"),
    ],
)
def test_errors_say_what_helps(make, words):
    with pytest.raises(ValueError, match=words):
        make()
