"""Calls that repeat: the recorded launch with other addresses.

No GPU here, so a stand-in takes the place of the compiled kernel: it reads the states from the addresses that it is given, as a
kernel would, and computes the mix in plain torch. Everything else is the code that runs on a GPU.
"""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from igva_kernels import FusionPlan, dispatch, fuse, recording
from igva_kernels.impl import reference
from igva_kernels.impl.triton import replay

SHAPE = (2, 5, 8)


def tensor_at(address: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 tensor that begins there."""
    buffer = (ctypes.c_float * torch.Size(shape).numel()).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.float32).reshape(shape)


class StandIn:
    """A kernel, compiled and not: ``launches`` counts the long way, ``runs`` the short one."""

    arg_names = ("states", "weights", "out", "means", "num_rows", "CONSTANT")
    function = packed_metadata = None

    def __init__(self, program) -> None:
        self.program, self.launches, self.runs = program, 0, 0

    def __getitem__(self, grid):
        def launched(states, weights, out, means, num_rows, *, CONSTANT, num_warps):
            self.launches += 1
            self._compute(states, weights, out, means)
            return self

        return launched

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, addresses, weights, out, means, *rest):
        assert (x, y, z, stream, rest) == (3, 2, 1, 7, (4, "constant"))
        self.runs += 1
        batch, tokens, width = SHAPE
        states = [tensor_at(address, SHAPE) for address in addresses]
        out = tensor_at(out, (batch, tokens - 1, len(self.program.slots) * width))
        if means is not None:
            means = tensor_at(means, (self.program.num_weighted_groups, batch, tokens - 1, width))
        self._compute(states, tensor_at(weights, (batch, self.program.num_weights)), out, means)

    def _compute(self, states, weights, out, means) -> None:
        mixed, kept = reference.fuse_forward(states, weights.detach(), self.program, 1, means is not None)
        out.copy_(mixed)
        if means is not None:
            means.copy_(kept)


@pytest.fixture
def small_plan() -> FusionPlan:
    return FusionPlan.igva(4, 2)


@pytest.fixture
def kernel(small_plan, monkeypatch) -> StandIn:
    """The stand-in behind ``impl="triton"``, with a current device and a stream."""
    stand_in = StandIn(small_plan.program)

    def fuse_forward(states, weights, program, num_prefix_tokens, save_means, *, indices=None, dtype=None):
        batch, tokens, width = states[0].shape
        patches = tokens - num_prefix_tokens
        out = states[0].new_empty(batch, patches, len(program.slots) * width)
        means = states[0].new_empty(program.num_weighted_groups, batch, patches, width) if save_means else None
        weights = weights.contiguous()
        replay.launch_recorded(stand_in, (3, 2), tuple(states), weights, out, means, patches, CONSTANT="constant", num_warps=4)
        return out, out.new_empty(0) if means is None else means

    module = SimpleNamespace(
        check_supported=lambda *arguments, **options: None,
        fuse_forward=fuse_forward,
        fuse_backward=reference.fuse_backward,
        recording=replay.recording,
        replay_of=replay.replay_of,
    )
    monkeypatch.setattr(dispatch, "implementation", lambda name: module if name == "triton" else reference)
    monkeypatch.setattr(replay.Replay, "can_run", lambda self: True)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    return stand_in


def inputs(seed: int = 0, shape=SHAPE):
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(shape, generator=generator) for _ in range(5)]
    return states, torch.rand(shape[0], 2, generator=generator)


def test_the_second_call_replays_with_its_own_states_and_weights(small_plan, kernel):
    for seed in range(3):
        states, weights = inputs(seed)
        fused = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
        expected = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="reference")
        assert torch.equal(fused, expected)
    assert (kernel.launches, kernel.runs) == (1, 2)


def test_gradients_of_the_weights_flow_through_a_replay(small_plan, kernel):
    for seed in range(2):
        states, weights = inputs(seed)
        gradients = {}
        for impl in ("triton", "reference"):
            leaf = weights.clone().requires_grad_()
            fuse(states, small_plan, leaf, num_prefix_tokens=1, impl=impl).square().sum().backward()
            gradients[impl] = leaf.grad
        torch.testing.assert_close(gradients["triton"], gradients["reference"])
    assert (kernel.launches, kernel.runs) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        "another_batch",
        "another_prefix",
        "weights_need_a_gradient",
        "weights_strided",
        "weights_in_float64",
        "weights_for_all_images",
        "the_last_state_strided",
        "a_state_strided",
        "a_state_misaligned",
        "a_state_needs_a_gradient",
        "float64",
    ],
)
def test_another_signature_takes_the_long_way(small_plan, kernel, change):
    states, weights = inputs()
    fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
    prefix = 1
    if change == "another_batch":
        states, weights = inputs(shape=(3, 5, 8))
    elif change == "another_prefix":
        prefix = 2
        kernel.program = None  # the stand-in computes for P = 1 alone; only the way counts here
        kernel._compute = lambda *arguments: None
    elif change == "weights_need_a_gradient":
        weights.requires_grad_()
    elif change == "weights_strided":
        weights = torch.stack((weights, weights), dim=-1)[..., 0]
    elif change == "weights_in_float64":
        weights = weights.double()
    elif change == "weights_for_all_images":
        weights = weights[0].clone()
    elif change == "the_last_state_strided":
        states[4] = torch.cat((states[4], states[4]), dim=1)[:, :5]
    elif change == "a_state_strided":
        states[2] = torch.cat((states[2], states[2]), dim=1)[:, :5]
    elif change == "a_state_misaligned":
        states[2] = torch.empty(states[2].numel() + 1)[1:].view(SHAPE).copy_(states[2])
    elif change == "a_state_needs_a_gradient":
        states[2].requires_grad_()
    elif change == "float64":
        states = [state.double() for state in states]
    fuse(states, small_plan, weights, num_prefix_tokens=prefix, impl="triton")
    assert (kernel.launches, kernel.runs) == (2, 0)


def test_weights_that_could_learn_are_replayed_where_nobody_listens(small_plan, kernel):
    states, weights = inputs()
    parameter = torch.nn.Parameter(weights)
    expected = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="reference")
    for _ in range(2):
        with torch.no_grad():
            fused = fuse(states, small_plan, parameter, num_prefix_tokens=1, impl="triton")
        assert torch.equal(fused, expected) and not fused.requires_grad
    assert (kernel.launches, kernel.runs) == (1, 1)
    fused = fuse(states, small_plan, parameter, num_prefix_tokens=1, impl="triton")
    assert fused.requires_grad and (kernel.launches, kernel.runs) == (2, 1)


def test_a_replay_in_inference_mode_makes_inference_tensors(small_plan, kernel):
    states, weights = inputs()
    expected = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="reference")
    with torch.inference_mode():
        for _ in range(2):
            fused = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
            assert torch.equal(fused, expected) and fused.is_inference()
    assert (kernel.launches, kernel.runs) == (1, 1)
    for _ in range(2):  # outside of it the outputs are ordinary tensors again
        fused = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
        assert torch.equal(fused, expected) and not fused.is_inference()
    assert (kernel.launches, kernel.runs) == (2, 2)


def test_weights_of_another_type_or_grad_fn_go_through_a_replay(small_plan, kernel):
    states, weights = inputs()
    for _ in range(2):
        leaf = weights.clone().requires_grad_()
        fused = fuse(states, small_plan, torch.softmax(leaf, dim=-1), num_prefix_tokens=1, impl="triton")
        fused.square().sum().backward()
        expected = weights.clone().requires_grad_()
        mixed = fuse(states, small_plan, torch.softmax(expected, dim=-1), num_prefix_tokens=1, impl="reference")
        mixed.square().sum().backward()
        torch.testing.assert_close(leaf.grad, expected.grad)
    assert (kernel.launches, kernel.runs) == (1, 1)
    fuse(states, small_plan, torch.nn.Parameter(weights), num_prefix_tokens=1, impl="triton")
    assert (kernel.launches, kernel.runs) == (2, 1)


def test_hooks_of_saved_tensors_see_what_a_replay_saves(small_plan, kernel):
    states, weights = inputs()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor.shape) or tensor, lambda tensor: tensor):
        for _ in range(2):
            fuse(states, small_plan, weights.clone().requires_grad_(), num_prefix_tokens=1, impl="triton")
    assert packed == [torch.Size((2, 2, 4, 8)), torch.Size((2, 2))] * 2 and kernel.runs == 1


def test_transforms_and_dispatch_modes_take_no_replay(small_plan, kernel):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Records(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            names.append(function._schema.name)
            return function(*arguments, **(options or {}))

    states, weights = inputs()
    fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
    names: list[str] = []
    with Records():
        fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
    assert "igva::fuse" in names and (kernel.launches, kernel.runs) == (2, 0)
    with pytest.raises(RuntimeError, match="functorch"):  # torch's operators with autograd know no transforms
        torch.func.grad(lambda w: fuse(states, small_plan, w, num_prefix_tokens=1, impl="triton").sum())(weights)
    assert kernel.runs == 0


def test_a_subclass_takes_no_replay(small_plan, kernel):
    class Subclass(torch.Tensor):
        pass

    states, weights = inputs()
    fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
    for place in (1, 4):  # the first and the last that the plan reads
        others = [*states]
        others[place] = states[place].as_subclass(Subclass)
        fuse(others, small_plan, weights, num_prefix_tokens=1, impl="triton")
    fuse(states, small_plan, weights.as_subclass(Subclass), num_prefix_tokens=1, impl="triton")
    assert kernel.runs == 0


def test_without_torchs_private_parts_every_call_takes_the_long_way(small_plan, kernel, monkeypatch):
    from igva_kernels import quick

    monkeypatch.setattr(quick, "TensorGuards", None)
    states, weights = inputs()
    for _ in range(2):
        fused = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
        assert torch.equal(fused, fuse(states, small_plan, weights, num_prefix_tokens=1, impl="reference"))
    assert (kernel.launches, kernel.runs) == (2, 0)


def test_outputs_are_allocated_without_torchs_private_parts_too(monkeypatch):
    private = recording.allocation_on(torch.device("cpu"))((2, 3), (3, 1), torch.bfloat16)
    monkeypatch.setattr(recording, "_guards", None)
    public = recording.allocation_on(torch.device("cpu"))((2, 3), (3, 1), torch.bfloat16)
    for made in (private, public):
        assert (made.shape, made.stride(), made.dtype, made.device) == ((2, 3), (3, 1), torch.bfloat16, torch.device("cpu"))


def test_bad_input_is_refused_after_a_recorded_call_as_before_it(small_plan, kernel):
    states, weights = inputs()
    fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
    with pytest.raises(ValueError, match=r"hidden_states\[3\] is None"):
        fuse([*states[:3], None, states[4]], small_plan, weights, num_prefix_tokens=1, impl="triton")
    with pytest.raises(ValueError, match="has 4 entries"):
        fuse(states[:4], small_plan, weights, num_prefix_tokens=1, impl="triton")
    with pytest.raises(ValueError, match="weights has the shape"):
        fuse(states, small_plan, torch.rand(2, 3), num_prefix_tokens=1, impl="triton")
    with pytest.raises(TypeError, match="weights must be a tensor"):
        fuse(states, small_plan, [0.5, 0.5], num_prefix_tokens=1, impl="triton")
    assert kernel.runs == 0


def test_a_recording_keeps_no_tensor_alive(small_plan, kernel):
    import weakref

    states, weights = inputs()
    fused = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
    alive = [weakref.ref(tensor) for tensor in (*states, weights, fused)]
    del states, weights, fused
    assert [reference() for reference in alive] == [None] * len(alive)


def test_plans_with_recordings_are_copied_and_pickled_without_them(small_plan, kernel):
    import copy
    import pickle

    states, weights = inputs()
    fuse(states, small_plan, weights, num_prefix_tokens=1, impl="triton")
    assert small_plan.memo
    for twin in (copy.deepcopy(small_plan), pickle.loads(pickle.dumps(small_plan))):
        assert twin == small_plan and not twin.memo
