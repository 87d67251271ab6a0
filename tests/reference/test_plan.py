"""Plans: resolution of indices, compilation to programs, errors that name the layer and the depth. IGVA's own presets."""

import pytest

from igva_kernels import FusionPlan, Layer, Mean, Norm, Weighted
from igva_kernels.program import SMALLEST_EPS, decode_program


def test_igva_groups_the_blocks_and_leaves_out_the_embedding():
    plan = FusionPlan.igva(24, 4)
    groups = (tuple(range(1, 7)), tuple(range(7, 13)), tuple(range(13, 19)), tuple(range(19, 25)))
    assert plan.slots == (Weighted(groups), Layer(23))
    assert plan.num_groups == 4
    assert plan.sources == tuple(range(1, 25))


def test_order_of_the_released_code_puts_the_base_first():
    assert FusionPlan.igva(24, 4, order="base_first").slots == FusionPlan.igva(24, 4).slots[::-1]


def test_stage_one_is_the_plain_mean_of_all_blocks():
    plan = FusionPlan.igva_average(24, 4, order="base_first")
    assert plan.slots == (Layer(23), Mean(tuple(range(1, 25))))
    assert plan.num_groups == 0


def test_llava_reads_the_penultimate_layer_alone():
    plan = FusionPlan.llava(24)
    assert plan.slots == (Layer(23),)
    assert plan.sources == (23,)


def test_negative_indices_resolve_against_the_true_depth():
    assert FusionPlan.igva(27, groups=[[1, -1], [-2, 3]], base=-2).slots == (Weighted(((1, 27), (3, 26))), Layer(26))


def test_equal_plans_are_equal_and_hashable_however_they_were_written():
    assert FusionPlan(4, (Mean((4, 1)),)) == FusionPlan(4, (Mean((1, -1)),))
    assert hash(FusionPlan.igva(8, 2)) == hash(FusionPlan.igva(8, groups=[[1, 2, 3, 4], [5, 6, 7, 8]]))


def test_a_layer_is_read_once_however_many_slots_use_it():
    program = FusionPlan.igva(24, 4).program
    assert program.num_sources == 24
    assert len(program.gradient_classes) == 5  # four groups, and the base, which is also in group 4
    assert program.class_of_source == (0,) * 6 + (1,) * 6 + (2,) * 6 + (3, 3, 3, 3, 4, 3)


def test_programs_survive_the_operators_list_of_ints(plan):
    assert decode_program(plan.program.encode()) == plan.program
    assert decode_program(plan.program.over_means().encode()) == plan.program.over_means()


def test_presets_are_made_as_the_class_that_is_asked():
    class Mine(FusionPlan):
        pass

    assert type(Mine.igva(4, 2)) is Mine and Mine.igva(4, 2) != FusionPlan.igva(4, 2)


def test_a_group_is_distinct_by_its_layers_and_by_its_norm():
    norm = Norm("layer")
    program = FusionPlan(3, (Weighted(((1, 2),), norm=norm), Weighted(((1, 2),)), Mean((1, 2), norm=norm))).program
    assert program.groups == ((0, 1), (0, 1))
    assert program.norms == (norm, None)
    assert program.has_norms and program.num_weighted_groups == 2
    assert not FusionPlan.igva(4, 2).program.has_norms


def test_normalised_layers_are_gradient_classes_of_their_own():
    program = FusionPlan(4, (Weighted(((1, 2), (3, 4)), norm=Norm("rms")),)).program
    assert program.class_of_source == (0, 1, 2, 3)
    plain = FusionPlan(4, (Weighted(((1, 2), (3, 4))),)).program
    assert plain.class_of_source == (0, 0, 1, 1)


def test_the_layer_beside_a_weighted_sum_takes_no_weight():
    plan = FusionPlan(4, (Weighted(((1, 2),), plus=-1),))
    assert plan.num_groups == 1 and plan.groups == ((1, 2),)
    assert plan.sources == (1, 2, 4) and plan.summary_sources == (1, 2)
    assert plan.slots == (Weighted(((1, 2),), plus=4),)


def test_summaries_are_of_the_states_as_they_are():
    plan = FusionPlan(4, (Weighted(((1, 2), (3,)), plus=4, norm=Norm("layer")),))
    assert plan.summary_program == FusionPlan(4, (Weighted(((1, 2), (3,))),)).summary_program
    assert not plan.mix_program.has_norms  # it runs over finished means


@pytest.mark.parametrize("eps", [SMALLEST_EPS, 1e-12, 1e-5, 0.1, 3.0])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_norm_crosses_the_operators_list_of_ints_to_the_last_bit(kind, eps):
    program = FusionPlan(2, (Mean((1, 2), norm=Norm(kind, eps)),)).program
    assert decode_program(program.encode()).norms == (Norm(kind, eps),)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FusionPlan.llava(24, layer=25), ["layer 25", "24 layers", "0 .. 24"]),
        (lambda: FusionPlan.llava(24, layer=-26), ["layer -26", "24 layers"]),
        (lambda: FusionPlan.igva(27, 4), ["num_groups=4", "27 layers", "[1, 3, 9, 27]", "groups="]),
        (lambda: FusionPlan.igva(24, 0), ["num_groups=0"]),
        (lambda: FusionPlan.igva(4, groups=[[1, 1]]), ["group 0", "layer 1", "more than once"]),
        (lambda: FusionPlan.igva(4, groups=[[4, -1]]), ["layer 4", "more than once"]),
        (lambda: FusionPlan.igva(4, groups=[[1], []]), ["group 1", "at least one layer"]),
        (lambda: FusionPlan.igva(4, groups=[]), ["at least one group"]),
        (lambda: FusionPlan.igva(4, 2, order="both"), ["order", "'both'", "fused_first"]),
        (lambda: FusionPlan.igva_average(4, groups=[[1], [2, 3]]), ["equal size", "FusionPlan.igva"]),
        (lambda: FusionPlan(0, (Layer(0),)), ["num_layers", "at least 1"]),
        (lambda: FusionPlan(3, ()), ["slots is empty"]),
        (lambda: FusionPlan(3, (Weighted(((1,),), plus=4),)), ["slot 0, plus", "layer 4", "3 layers"]),
        (lambda: Norm("batch"), ["kind", "'layer'", "'rms'", "'batch'"]),
        (lambda: Norm("rms", eps=-1e-5), ["eps", "-1e-05"]),
        (lambda: Norm("rms", eps=float("nan")), ["eps", "nan"]),
    ],
)
def test_value_errors_say_what_was_got_and_what_helps(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusionPlan(3, (1,)),
        lambda: FusionPlan(3, (Layer(1.0),)),
        lambda: FusionPlan("3", (Layer(1),)),
        lambda: FusionPlan(3, (Mean((1,), norm="layer"),)),
        lambda: FusionPlan(3, (Weighted(((1,),), norm=1e-5),)),
        lambda: FusionPlan.layers(3, ["1"]),
    ],
)
def test_wrong_types_are_type_errors(make):
    with pytest.raises(TypeError):
        make()
