"""How far apart two answers of a graph are: against torch's own divergences, and what counts for how much."""

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence

from nmconvert.calibrate.distance import Distance, Said


def maps(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(shape, generator=generator) for shape in shapes]


def relative(output, target):
    """The squared error of rows, relative to the variance of each channel."""
    return ((output - target).square().mean(0) / target.var(0, unbiased=False)).mean()


def test_chances_are_compared_by_their_divergence_and_as_numbers_relative_to_the_best_constant():
    (target,), (output,) = maps((4, 3, 5)), maps((4, 3, 5), seed=1)
    distance = Distance([Said("p", "chance")], [[part[None]] for part in target])
    usual = target.sigmoid().mean((0, 2), keepdim=True).expand_as(target)
    lost = kl_divergence(Bernoulli(logits=target), Bernoulli(logits=output)).sum()
    constant = kl_divergence(Bernoulli(logits=target), Bernoulli(probs=usual)).sum()
    numbers = relative(*(x.movedim(1, -1).flatten(0, 1) for x in (output, target)))
    torch.testing.assert_close(distance([output], [target]), (lost / constant + numbers) / 2)


def test_choices_are_compared_along_their_axis_and_a_shift_of_their_logits_is_nothing():
    (target,), (output,) = maps((4, 6, 3)), maps((4, 6, 3), seed=1)
    distance = Distance([Said("c", "choice", 2)], [[target]])
    usual = target.softmax(2).mean((0, 1), keepdim=True)
    lost = kl_divergence(Categorical(logits=target), Categorical(logits=output)).sum()
    constant = kl_divergence(Categorical(logits=target), Categorical(probs=usual.expand_as(target))).sum()
    numbers = relative(*((x - x.mean(2, keepdim=True)).flatten(0, 1) for x in (output, target)))
    torch.testing.assert_close(distance([output], [target]), (lost / constant + numbers) / 2)
    torch.testing.assert_close(distance([target + 3], [target]), torch.zeros(()), atol=1e-6, rtol=0)


def test_values_and_choices_count_more_where_the_one_chance_says_that_there_is_something():
    target = maps((2, 4, 8), (2, 1, 8), (2, 3, 8))
    target[1][:] = -30.0
    target[1][:, :, :2] = 30.0
    distance = Distance([Said("box"), Said("something", "chance"), Said("what", "choice")], [target])
    errors = {}
    for where in (slice(2, 4), slice(0, 2)):
        changed = [x.clone() for x in target]
        for number in (0, 2):
            changed[number][:, :, where] += maps((2, target[number].shape[1], 2), seed=3)[0]
        errors[where.start] = float(distance(changed, target))
    assert errors[0] > 2 * errors[2] > 0


def test_every_channel_of_values_counts_alike_but_for_one_that_does_not_vary():
    target = maps((64, 3))[0] * torch.tensor([1.0, 3.0, 1e-9])
    distance = Distance([Said("v")], [[target]])
    errors = []
    for channel in range(2):
        output = target.clone()
        output[:, channel] = target[:, channel].mean()
        errors.append(float(distance([output], [target])))
    assert errors == pytest.approx([1 / 3, 1 / 3], rel=1e-3)


def test_flat_and_whole_numbers_are_no_obstacle():
    (target,) = maps((6,))
    distance = Distance([Said("p", "chance"), Said("label")], [[target, torch.arange(6)]])
    assert float(distance([target, torch.zeros(6).long()], [target, torch.arange(6)])) == 0
    assert float(distance([-target, torch.arange(6)], [target, torch.arange(6)])) > 1


def test_gradients_go_through_extreme_answers():
    target = [torch.full((2, 1, 4), 60.0), torch.full((2, 3, 4), -60.0)]
    target[0][:, :, 0] = -60.0
    output = [(-t).requires_grad_() for t in target]
    Distance([Said("p", "chance"), Said("c", "choice")], [target])(output, target).backward()
    assert all(bool(t.grad.isfinite().all()) for t in output)
