"""The chunked cross-entropy: the same number and gradients as the plain one, without the full logits."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from model import cross_entropy
from model.cross_entropy import LanguageModelHead, chunked_cross_entropy

POSITIONS, WIDTH, VOCABULARY = 37, 24, 53


def plain_cross_entropy(hidden_states: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, from the full logits."""
    logits = nn.functional.linear(hidden_states, weight, bias)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(exact), targets, reduction="sum")


def make_inputs(dtype: torch.dtype, positions: int = POSITIONS, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden_states": torch.randn(positions, WIDTH, generator=generator, dtype=torch.float64),
        "weight": torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64),
        "bias": torch.randn(VOCABULARY, generator=generator, dtype=torch.float64),
    }
    # Rounded first: the float64 yardstick then starts from the same numbers.
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    return {**inputs, "targets": torch.randint(0, VOCABULARY, (positions,), generator=generator)}


def run(
    function: Any, inputs: dict[str, Tensor], dtype: torch.dtype, names: tuple[str, ...], **options: Any
) -> dict[str, Tensor]:
    """Loss and gradients; the loss is divided as in training, so that the backward's scaling is at work."""
    leaves = {
        name: value.to(dtype).requires_grad_(name in names) if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    loss = function(**leaves, **options)
    (loss / 7).backward()
    return {"loss": loss.detach(), **{name: leaves[name].grad for name in names}}


LEARNS = {
    "all": ("hidden_states", "weight", "bias"),
    "states": ("hidden_states",),
    "head": ("weight", "bias"),
}


@pytest.mark.parametrize("rows", [1, 5, 16, POSITIONS, 1000])
@pytest.mark.parametrize("learns", LEARNS)
def test_loss_and_gradients_are_those_of_the_definition(rows, learns):
    inputs = make_inputs(torch.float64)
    expected = run(plain_cross_entropy, inputs, torch.float64, LEARNS[learns])
    actual = run(chunked_cross_entropy, inputs, torch.float64, LEARNS[learns], logits_per_chunk=rows * VOCABULARY)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-13, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_no_larger_than_those_of_the_plain_loss(dtype):
    inputs = make_inputs(dtype, positions=200)
    names = LEARNS["all"]
    truth = run(plain_cross_entropy, inputs, torch.float64, names)
    plain = run(plain_cross_entropy, inputs, dtype, names)
    chunked = run(chunked_cross_entropy, inputs, dtype, names, logits_per_chunk=16 * VOCABULARY)
    # One rounding of the largest entry on top: the gradient is rounded before it is scaled, and scaling rounds once more.
    slack = torch.finfo(dtype).eps
    for name in truth:
        own, theirs = ((result[name].double() - truth[name]).abs().max() for result in (chunked, plain))
        assert own <= theirs + slack * truth[name].abs().max(), name
    assert chunked["weight"].dtype == dtype and chunked["loss"].dtype == torch.float32


def test_the_weight_s_gradient_is_summed_in_fp32_over_the_chunks():
    # 2,048 positions that pull at one row alike: with the sum in bfloat16, which has 8 bits, the later chunks would be lost.
    hidden = torch.ones(2048, 4, dtype=torch.bfloat16)
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, requires_grad=True)
    chunked_cross_entropy(hidden, torch.zeros(2048, dtype=torch.long), weight, logits_per_chunk=2 * 1).backward()
    assert torch.equal(weight.grad, torch.tensor([[-1024.0] * 4, [1024.0] * 4], dtype=torch.bfloat16))


def test_under_autocast_it_computes_as_the_plain_loss_does():
    inputs = make_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(plain_cross_entropy, inputs, torch.float32, LEARNS["all"])
        actual = run(chunked_cross_entropy, inputs, torch.float32, LEARNS["all"])
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-6, atol=0)
    for name in LEARNS["all"]:
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=float(expected[name].abs().max()) * 2**-8)


def test_two_runs_give_the_same_bits():
    inputs = make_inputs(torch.float32)
    first, second = (run(chunked_cross_entropy, inputs, torch.float32, LEARNS["all"], logits_per_chunk=300) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- memory -------------------------------------------------------------------------------------------------------------


class Memory(TorchDispatchMode):
    """The largest tensor as wide as the vocabulary, and the most bytes alive at once, of all that is made within."""

    def __init__(self) -> None:
        super().__init__()
        self.most_rows = self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(tensor, Tensor):
                continue
            if tensor.ndim == 2 and VOCABULARY in tensor.shape and WIDTH not in tensor.shape:
                self.most_rows = max(self.most_rows, tensor.numel() // VOCABULARY)
            if tensor.untyped_storage().data_ptr() not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, num_bytes: int) -> None:
        self.alive -= num_bytes


def memory_of(function: Any, positions: int, **options: Any) -> Memory:
    inputs = make_inputs(torch.float32, positions)
    with Memory() as memory:
        run(function, inputs, torch.float32, ("hidden_states", "weight"), **options)
    return memory


def test_no_tensor_of_positions_by_vocabulary_is_larger_than_a_chunk():
    chunked = memory_of(chunked_cross_entropy, 600, logits_per_chunk=16 * VOCABULARY)
    assert chunked.most_rows == 16
    assert memory_of(plain_cross_entropy, 600).most_rows == 600  # what the count would see


def test_the_peak_grows_with_the_states_and_not_with_the_logits():
    few, many = (
        memory_of(chunked_cross_entropy, positions, logits_per_chunk=16 * VOCABULARY).peak for positions in (600, 1200)
    )
    # The gradient of the states, and nothing else, is as long as the positions.
    assert many - few == 600 * WIDTH * 4
    few, many = (memory_of(plain_cross_entropy, positions).peak for positions in (600, 1200))
    assert many - few >= 2 * 600 * VOCABULARY * 4


def test_a_chunk_holds_the_logits_that_the_constant_allows(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_CHUNK", 150 * VOCABULARY)
    assert memory_of(chunked_cross_entropy, 600).most_rows == 128  # whole multiples of 64 positions
    monkeypatch.setattr(cross_entropy, "LOGITS_PER_CHUNK", 1)
    assert memory_of(chunked_cross_entropy, 3).most_rows == 1  # never less than a position


def test_a_head_that_does_not_learn_costs_no_gradient():
    products = []
    matmul = torch.ops.aten.mm.default

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
            products.append(func is matmul)
            return func(*args, **(kwargs or {}))

    inputs = make_inputs(torch.float32)
    counts = []
    for names in (("hidden_states", "weight"), ("hidden_states",), ()):
        products.clear()
        with Count():
            loss = chunked_cross_entropy(
                inputs["hidden_states"].requires_grad_("hidden_states" in names),
                inputs["targets"],
                inputs["weight"].requires_grad_("weight" in names),
            )
        assert loss.requires_grad == bool(names)
        counts.append(sum(products))
    assert counts == [3, 2, 1]


def test_without_gradients_only_the_loss_is_computed():
    inputs = {name: value for name, value in make_inputs(torch.float32).items() if name != "bias"}
    inputs["weight"].requires_grad_()
    with Memory() as memory, torch.no_grad():
        loss = chunked_cross_entropy(**inputs, logits_per_chunk=16 * VOCABULARY)
    assert not loss.requires_grad
    assert memory.peak < VOCABULARY * WIDTH * 4 + 3 * 16 * VOCABULARY * 4  # no gradient of the weight among it


# ---- edges --------------------------------------------------------------------------------------------------------------


def test_no_position_gives_a_loss_and_gradients_of_zero():
    result = run(chunked_cross_entropy, make_inputs(torch.float32, positions=0), torch.float32, LEARNS["all"])
    assert result["loss"] == 0
    assert result["weight"].shape == (VOCABULARY, WIDTH)
    assert not result["weight"].any() and not result["bias"].any()


def test_logits_of_any_size_give_no_overflow():
    hidden, weight = torch.full((3, 2), 1e4), torch.tensor([[1.0, 1.0], [-1.0, -1.0]], requires_grad=True)
    targets = torch.tensor([0, 0, 1])
    loss = chunked_cross_entropy(hidden, targets, weight)
    loss.backward()
    assert loss.item() == pytest.approx(4e4)
    assert weight.grad.isfinite().all()


def test_a_second_backward_through_the_same_graph_is_refused():
    inputs = make_inputs(torch.float32)
    loss = chunked_cross_entropy(inputs["hidden_states"].requires_grad_(), inputs["targets"], inputs["weight"])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_does_not_fit_is_refused():
    inputs = make_inputs(torch.float32)
    with pytest.raises(ValueError, match=r"\(37, 24\), \(36,\) and \(53, 24\), expected \(positions, width\)"):
        chunked_cross_entropy(inputs["hidden_states"], inputs["targets"][1:], inputs["weight"])
    with pytest.raises(ValueError, match="logits_per_chunk must be above 0, got 0"):
        chunked_cross_entropy(inputs["hidden_states"], inputs["targets"], inputs["weight"], logits_per_chunk=0)


# ---- the head -----------------------------------------------------------------------------------------------------------


def test_the_head_is_a_linear_layer_that_takes_targets():
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, VOCABULARY)
    head = LanguageModelHead.from_linear(linear)
    inputs = make_inputs(torch.float32)
    assert head.weight is linear.weight and head.bias is linear.bias
    assert head.state_dict().keys() == linear.state_dict().keys()
    assert torch.equal(head(inputs["hidden_states"]), linear(inputs["hidden_states"]))
    expected = plain_cross_entropy(inputs["hidden_states"], inputs["targets"], linear.weight, linear.bias)
    torch.testing.assert_close(head(inputs["hidden_states"], inputs["targets"]), expected, rtol=1e-6, atol=0)
    assert LanguageModelHead.from_linear(head) is head


def test_a_head_that_computes_something_else_is_refused():
    class Quantised(nn.Linear):
        pass

    with pytest.raises(TypeError, match=r"must be nn\.Linear, got Quantised"):
        LanguageModelHead.from_linear(Quantised(2, 3))


def test_tied_weights_get_the_gradient_of_both_uses():
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, VOCABULARY, (POSITIONS,)), torch.randint(0, VOCABULARY, (POSITIONS,))
    embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    plain_cross_entropy(embedding(tokens).sin(), targets, embedding.weight).backward()
    expected, embedding.weight.grad = embedding.weight.grad, None
    chunked_cross_entropy(embedding(tokens).sin(), targets, embedding.weight, logits_per_chunk=10 * VOCABULARY).backward()
    torch.testing.assert_close(embedding.weight.grad, expected, rtol=1e-13, atol=1e-13)
