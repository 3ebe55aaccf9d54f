"""The losses against formulas written out here, their masks, and where gradients go."""

from dataclasses import replace

import numpy as np
import pytest
import torch as th
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from sb3_boom.core import losses
from sb3_boom.core.actor import Actor
from sb3_boom.core.critic import Critic
from sb3_boom.core.losses import LossConfig
from sb3_boom.core.world_model import WorldModel

H, B, A, L, F = 3, 8, 2, 16, 5
CONFIG = LossConfig(
    gamma=0.9, n_steps=1, rho=0.5, consistency_coef=20.0, reward_coef=0.1, value_coef=0.1, termination_coef=1.0, ent_coef=1e-4,
    alignment="release", align_coef=0.04, align_scale="q_scale", align_weighting="softmax", align_temperature=1.0,
    align_warmup=True, tau=0.01,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded():
    th.manual_seed(0)


def make_networks(handle_terminations=True):
    """World model, actor, critic and target critic, away from their initial symmetry."""
    networks = (
        WorldModel(F, A, L, 16, 16, simnorm_dim=8, handle_terminations=handle_terminations),
        Actor(L, A, 16),
        Critic(L, A, 16, 3),
        Critic(L, A, 16, 3),
    )
    for module in networks:
        for parameter in module.parameters():
            parameter.data += 0.3 * th.randn_like(parameter)
    networks[3].requires_grad_(False)
    return networks


def make_batch(valid=None):
    batch = dict(
        features=th.randn(B, F),
        next_features=th.randn(H, B, F),
        actions=th.rand(H, B, A) * 2 - 1,
        rewards=th.randn(H, B, 1),
        terminations=th.zeros(H, B, 1),
        valid=th.ones(H, B, 1, dtype=th.bool) if valid is None else valid,
    )
    planner = dict(planner_actions=th.rand(H, B, A) * 2 - 1, planner_stds=th.rand(H, B, A) + 0.05)
    return batch, planner


def make_noise(dropout=0.0):
    return losses.draw_noise(H, B, A, 3, 16, dropout, th.device("cpu"))


def partly_valid():
    valid = th.ones(H, B, 1, dtype=th.bool)
    valid[1:, 0] = False
    valid[2, 1] = False
    return valid


def both_losses(networks, batch, planner, noise, scale=3.0, config=CONFIG):
    world_model, actor, critic, target = networks
    model_loss, latents, model_terms = losses.model_loss(world_model, actor, critic, target, config, noise=noise, **batch)
    policy_loss, _, q, policy_terms = losses.policy_loss(
        actor, critic, config, latents, valid=batch["valid"], scale=th.tensor(scale), noise=noise, **planner
    )
    return model_loss, policy_loss, {**model_terms, **policy_terms}, q


def gradients(networks, *loss):
    for network in networks:
        network.zero_grad()
    for one in loss:
        one.backward(retain_graph=True)
    return {
        f"{i}.{name}": parameter.grad.clone()
        for i, network in enumerate(networks)
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


# ------------------------------------------------------------------- TD target


def test_termination_stops_the_target_and_truncation_bootstraps():
    _, actor, _, target = make_networks()
    z, rewards, noise, pair = th.rand(H, B, L), th.randn(H, B, 1), th.randn(H, B, A), th.tensor([2, 0])
    ended = th.zeros(H, B, 1)
    ended[1, 3] = 1.0
    y = losses.td_target(actor, target, z, rewards, ended, th.ones(H, B, 1, dtype=th.bool), 0.9, 1, noise, pair)
    logits = target(z, actor.sample(z, noise))
    values = target.two_hot.decode(logits)
    expected = rewards + 0.9 * th.minimum(values[2], values[0])  # the pair's minimum, the third critic left out
    expected[1, 3] = rewards[1, 3]
    th.testing.assert_close(y, expected)


@pytest.mark.parametrize("n_steps", [1, 2, H])
def test_target_sums_n_rewards_as_far_as_window_and_episode_hold_them(n_steps):
    _, actor, _, target = make_networks()
    z, rewards, noise, pair = th.rand(H, B, L), th.randn(H, B, 1), th.randn(H, B, A), th.tensor([0, 1])
    ended, valid = (th.rand(H, B, 1) < 0.3).float(), partly_valid()
    y = losses.td_target(actor, target, z, rewards, ended, valid, 0.9, n_steps, noise, pair)
    values = th.minimum(*target.values(z, actor.sample(z, noise), pair))
    for t, b in valid.squeeze(-1).nonzero().tolist():
        expected, discount, last = 0.0, 1.0, t
        for k in range(t, min(t + n_steps, H)):
            if not valid[k, b]:
                break
            expected, discount, last = expected + discount * rewards[k, b], 0.9 * discount, k
            if ended[k, b]:
                break
        expected = expected + discount * (1.0 - ended[last, b]) * values[last, b]
        th.testing.assert_close(y[t, b], expected)


@pytest.mark.parametrize("handle_terminations", [True, False])
def test_without_termination_head_every_end_bootstraps(handle_terminations):
    networks, noise = make_networks(handle_terminations), make_noise()
    batch, planner = make_batch()
    _, _, before, _ = both_losses(networks, batch, planner, noise)
    batch["terminations"] = th.ones(H, B, 1)
    _, _, after, _ = both_losses(networks, batch, planner, noise)
    assert ("termination_loss" in after) == handle_terminations
    assert (before["critic_loss"] != after["critic_loss"]) == handle_terminations


# ----------------------------------------------------- both losses, written out

# no two coefficients alike
UNLIKE = replace(
    CONFIG, consistency_coef=2.0, reward_coef=3.0, value_coef=5.0, termination_coef=7.0, ent_coef=0.3, align_coef=0.7,
    alignment="forward_kl", align_temperature=0.4, rho=0.8, tau=0.2,
)  # fmt: skip


def test_model_loss_is_every_terms_part_along_the_rollout():
    world_model, actor, critic, target = make_networks()
    batch, _ = make_batch(partly_valid())
    batch["terminations"] = (th.rand(H, B, 1) < 0.5).float()
    noise = make_noise(dropout=0.3)
    loss, latents, terms = losses.model_loss(world_model, actor, critic, target, UNLIKE, noise=noise, **batch)

    next_z = world_model.encode(batch["next_features"])
    y = losses.td_target(
        actor, target, next_z, batch["rewards"], batch["terminations"], batch["valid"],
        0.9, 1, noise.target_action, noise.critic_pairs[0],
    )  # fmt: skip
    kept = noise.value_dropout.view(3, H, B, 16)
    z = world_model.encode(batch["features"])
    expected = dict.fromkeys(("consistency", "reward", "critic", "termination"), 0.0)
    for t in range(H):
        seen = batch["valid"][t].squeeze(-1)
        th.testing.assert_close(latents[t][seen], z[seen].detach())
        action = batch["actions"][t]
        predicted = world_model.next(z, action)
        value_logits = critic(z, action, dropout_mask=kept[:, t])
        terms_t = dict(
            consistency=(predicted - next_z[t]).square().mean(-1, keepdim=True),
            reward=world_model.two_hot.cross_entropy(world_model.reward_logits(z, action), batch["rewards"][t]),
            critic=critic.two_hot.cross_entropy(value_logits, y[t]).mean(0),
            termination=sum(
                0.5
                * th.nn.functional.binary_cross_entropy(
                    world_model.termination(latent).sigmoid(), batch["terminations"][t], reduction="none"
                )
                for latent in (predicted, next_z[t])
            ),
        )
        for name, term in terms_t.items():
            expected[name] = expected[name] + 0.8**t * term[batch["valid"][t]].sum() / (H * B)
        z = predicted
    for name, value in expected.items():
        th.testing.assert_close(terms[f"{name}_loss"], value.detach())
    whole = 2 * expected["consistency"] + 3 * expected["reward"] + 5 * expected["critic"] + 7 * expected["termination"]
    th.testing.assert_close(loss, whole)


def test_policy_loss_is_value_entropy_and_weighted_alignment():
    _, actor, critic, _ = make_networks()
    batch, planner = make_batch(partly_valid())
    noise, valid, latents = make_noise(dropout=0.3), batch["valid"], th.rand(H, B, L)
    loss, scale, values, terms = losses.policy_loss(
        actor, critic, UNLIKE, latents, valid=valid, scale=th.tensor(3.0), noise=noise, **planner
    )
    mean, log_std = actor(latents)
    action = th.tanh(mean + noise.policy_action * log_std.exp())
    kept = noise.policy_dropout.view(2, H, B, 16)
    first, second = noise.critic_pairs[1]
    masks = th.ones(3, H, B, 16, dtype=th.bool)
    masks[first], masks[second] = kept
    q = critic.two_hot.decode(critic(latents, action, dropout_mask=masks.flatten(1, 2)))
    q = th.minimum(q[first], q[second])
    th.testing.assert_close(values[valid], q[valid].detach())
    new_scale = losses.update_scale(th.tensor(3.0), th.where(valid, q, values)[0].detach(), 0.2)
    th.testing.assert_close(scale, new_scale)
    q = q / new_scale

    entropy = A * Normal(0.0, 1.0).log_prob(noise.policy_action).sum(-1, keepdim=True) - A * log_std.sum(-1, keepdim=True)
    entropy = entropy + A * (A - 1) * 0.5 * np.log(2 * np.pi)  # the release counts ½ ln 2π once, then multiplies by A
    log_prob = entropy - th.log(th.relu(1 - action**2) + 1e-6).sum(-1, keepdim=True)
    planner_pre_squash = planner["planner_actions"].clamp(-0.999, 0.999).atanh()
    density = Normal(mean, log_std.exp().clamp(min=0.05)).log_prob(planner_pre_squash).sum(-1, keepdim=True)
    value, alignment = th.zeros(()), th.zeros(())
    for t in range(H):
        weights = (q[t][valid[t]] / 0.4).softmax(0).detach()
        value = value + 0.8**t / H * (0.3 * log_prob - q)[t][valid[t]].sum() / B
        alignment = alignment - 0.8**t / H * (weights * density[t][valid[t]] / new_scale).sum()
    th.testing.assert_close(terms["actor_value_loss"], value)
    th.testing.assert_close(terms["q_mean"], values[valid].mean())
    th.testing.assert_close(terms["log_prob"], log_prob[valid].mean())
    th.testing.assert_close(terms["align_loss"], alignment)
    th.testing.assert_close(loss, value + 0.7 * alignment)


# ----------------------------------------------------------------------- masks


@pytest.mark.parametrize("alignment", losses.ALIGNMENTS)
@pytest.mark.parametrize("weighting", losses.ALIGN_WEIGHTINGS)
def test_nan_in_an_invalid_step_leaves_losses_and_gradients_unchanged(alignment, weighting):
    networks, noise, valid = make_networks(), make_noise(), partly_valid()
    config = replace(CONFIG, alignment=alignment, align_weighting=weighting)
    batch, planner = make_batch(valid)
    results = []
    for _ in range(2):
        model_loss, policy_loss, terms, _ = both_losses(networks, batch, planner, noise, config=config)
        results.append((terms, gradients(networks, model_loss, policy_loss)))
        for data in (batch, planner):
            for name in set(data) - {"valid", "features"}:
                data[name] = th.where(valid, data[name], th.nan)
    for clean, spoilt in zip(*results, strict=True):
        assert clean.keys() == spoilt.keys()
        for name in clean:
            assert th.isfinite(spoilt[name]).all(), name
            th.testing.assert_close(spoilt[name], clean[name], msg=name)


def test_every_transition_keeps_its_weight_whatever_is_masked():
    per_step = th.randn(H, B, 1)
    valid, weights = partly_valid(), losses.time_weights(H, 0.5, per_step)
    expected = sum(0.5**t * per_step[t][valid[t]].sum() for t in range(H)) / (H * B)
    th.testing.assert_close(losses.masked_mean(per_step, valid, weights), expected)


def test_termination_loss_moves_its_head_alone():
    """A gradient into dynamics or encoder teaches them to flag the steps they have seen."""
    world_model, actor, critic, target = make_networks()
    config = replace(CONFIG, consistency_coef=0.0, reward_coef=0.0, value_coef=0.0)
    batch, _ = make_batch(partly_valid())
    loss = losses.model_loss(world_model, actor, critic, target, config, noise=make_noise(), **batch)[0]
    loss.backward()
    moved = {name.split(".")[0] for name, p in world_model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"termination"}


def test_time_steps_are_weighted_by_powers_of_rho():
    th.testing.assert_close(losses.time_weights(3, 0.5, th.ones(())).ravel(), th.tensor([1.0, 0.5, 0.25]) / 3)


# ------------------------------------------------------------------- gradients


def test_policy_loss_reaches_the_policy_alone():
    networks, noise = make_networks(), make_noise(dropout=0.01)
    batch, planner = make_batch()
    _, policy_loss, _, _ = both_losses(networks, batch, planner, noise)
    assert {name.split(".")[0] for name in gradients(networks, policy_loss)} == {"1"}


def test_model_loss_reaches_world_model_and_critics_alone():
    networks, noise = make_networks(), make_noise(dropout=0.01)
    batch, planner = make_batch()
    model_loss, _, _, _ = both_losses(networks, batch, planner, noise)
    found = gradients(networks, model_loss)
    expected = {f"{i}.{name}" for i in (0, 2) for name, _ in networks[i].named_parameters()}
    assert set(found) == expected


# ------------------------------------------------------- weights, scale, dropout


def test_soft_value_weights_are_a_softmax_over_the_valid_batch():
    q, valid = th.randn(H, B, 1), partly_valid()
    valid[2] = False  # a time step that no window reaches
    weights = losses.value_weights(q, valid, "softmax", 0.5)
    for t in range(2):
        expected = np.exp(q[t][valid[t]].numpy() / 0.5)
        np.testing.assert_allclose(weights[t][valid[t]], expected / expected.sum(), rtol=1e-5)
    assert not weights[~valid].any()
    uniform = losses.value_weights(q, valid, "uniform", 0.5)
    assert (uniform[valid] == 1 / B).all()
    assert not uniform[~valid].any()


@pytest.mark.parametrize("n", [1, 2, 37, 256])
def test_scale_follows_the_percentile_range(n):
    values = 20 * th.randn(n, 1)
    spread = max(1.0, np.subtract(*np.percentile(values.numpy(), [95, 5])))
    assert losses.update_scale(th.tensor(4.0), values, 0.1).item() == pytest.approx(4.0 + 0.1 * (spread - 4.0), rel=1e-5)


@pytest.mark.parametrize("dropout", [0.01, 0.3, 0.95])
def test_dropped_units_are_independent(dropout):
    kept = losses.draw_kept((2000, 3, 50), dropout, th.device("cpu")).view(2000, 150).double()
    std = (dropout * (1 - dropout)) ** 0.5
    # every unit as often as any other, the first and the last too: within six standard errors
    assert (1 - kept.mean(0)).sub(dropout).abs().max().item() < 6 * std / 2000**0.5
    # neighbours know nothing of each other, nor do far ones
    for distance in (1, 2, 50):
        covariance = ((kept[:, distance:] - 1 + dropout) * (kept[:, :-distance] - 1 + dropout)).mean().item()
        assert abs(covariance) < 5 * std**2 / (2000 * 100) ** 0.5
    assert losses.draw_kept((1, 1), dropout, th.device("cpu")).shape == (1, 1)


def test_dropout_drops_one_unit_in_a_hundred_and_is_off_without_a_mask():
    noise = losses.draw_noise(3, 128, A, 5, 128, 0.01, th.device("cpu"))
    for mask, n in ((noise.value_dropout, 5), (noise.policy_dropout, 2)):
        assert mask.shape == (n, 3 * 128, 128)
        assert abs((~mask).float().mean().item() - 0.01) < 0.002
    assert make_noise(dropout=0.0).value_dropout is None
    critic = make_networks()[2]
    z, action, kept = th.rand(B, L), th.rand(B, A), th.ones(3, B, 16, dtype=th.bool)
    th.testing.assert_close(critic(z, action, dropout_mask=kept), critic(z, action))
    kept[1, :, 4] = False
    changed = critic(z, action, dropout_mask=kept) != critic(z, action)
    assert changed.flatten(1).any(1).tolist() == [False, True, False]


# -------------------------------------------------------------------- alignment


def likelihood(alignment, scale, **given):
    arguments = dict(
        mean=th.randn(H, B, A), log_std=th.rand(H, B, A) - 2.0, noise=th.randn(H, B, A),
        planner_actions=th.rand(H, B, A) * 1.8 - 0.9, planner_stds=th.rand(H, B, A) + 0.05,
    )  # fmt: skip
    arguments.update(given)
    return losses.alignment_likelihood(alignment, scale=th.tensor(scale), divisor=th.tensor(scale), **arguments), arguments


def test_release_alignment_pulls_the_sample_towards_the_planner_once_the_scale_opens_the_gate():
    closed, _ = likelihood("release", 2.0)
    assert not closed.any()
    opened, given = likelihood("release", 4.0)
    std = given["log_std"].exp().clamp(min=0.05)
    action = th.tanh(given["mean"] + given["noise"] * given["log_std"].exp())
    density = Normal(given["planner_actions"], std).log_prob(action).sum(-1, keepdim=True)
    # the release counts ½ ln 2π once, then multiplies by A
    expected = A * (density + (A - 1) * 0.5 * np.log(2 * np.pi)) / 4.0
    th.testing.assert_close(opened, expected)


def test_forward_kl_is_the_likelihood_of_the_planners_action():
    ours, given = likelihood("forward_kl", 4.0)
    policy = Independent(Normal(given["mean"], given["log_std"].exp()), 1)
    expected = policy.log_prob(th.atanh(given["planner_actions"])).unsqueeze(-1) / 4.0
    th.testing.assert_close(ours, expected)
    # where it would be infinite: a plan at its bound, a policy without spread
    zeros, ones = th.zeros(H, B, A), th.ones(H, B, A)
    at_bounds, _ = likelihood("forward_kl", 4.0, mean=zeros, log_std=-10 * ones, planner_actions=ones)
    expected = A * Normal(0.0, 0.05).log_prob(th.tensor(0.999).atanh()) / 4.0
    th.testing.assert_close(at_bounds, expected.expand(H, B, 1))


def test_forward_kl_teaches_mean_and_std():
    mean, log_std = th.zeros(H, B, A, requires_grad=True), th.zeros(H, B, A, requires_grad=True)
    ours, _ = likelihood("forward_kl", 4.0, mean=mean, log_std=log_std)
    ours.sum().backward()
    assert mean.grad.any()
    assert log_std.grad.any()


def test_reverse_kl_is_the_sampled_divergence_from_the_planners_gaussian():
    ours, given = likelihood("reverse_kl", 4.0)
    gaussian = Normal(given["mean"].double(), given["log_std"].double().exp())
    policy = Independent(TransformedDistribution(gaussian, [TanhTransform(cache_size=1)]), 1)
    action = th.tanh(given["mean"] + given["noise"] * given["log_std"].exp()).double()
    planner = Independent(Normal(given["planner_actions"].double(), given["planner_stds"].double()), 1)
    expected = (planner.log_prob(action) - policy.log_prob(action)).unsqueeze(-1) / 4.0
    th.testing.assert_close(ours.double(), expected, rtol=1e-2, atol=1e-2)  # the release's 1e-6 inside the log


def test_no_alignment_is_no_alignment():
    ours, _ = likelihood("none", 4.0)
    assert not ours.any()
    networks, noise = make_networks(), make_noise()
    batch, planner = make_batch()
    _, loss, terms, _ = both_losses(networks, batch, planner, noise, config=replace(CONFIG, alignment="none"))
    th.testing.assert_close(loss.detach(), terms["actor_value_loss"])
    assert terms["align_active"] == 0.0


@pytest.mark.parametrize("alignment", ["release", "forward_kl", "reverse_kl"])
def test_alignment_fades_with_the_q_scale_or_keeps_its_weight(alignment):
    """With so small a ``tau`` the Q scale stays as given."""
    networks, noise = make_networks(), make_noise()
    batch, planner = make_batch()
    config = replace(CONFIG, alignment=alignment, align_weighting="uniform", tau=1e-9)

    def align_loss(scale, **settings):
        _, _, terms, _ = both_losses(networks, batch, planner, noise, scale=scale, config=replace(config, **settings))
        return terms["align_loss"].item()

    assert align_loss(400.0) == pytest.approx(align_loss(4.0) / 100.0, rel=1e-4)
    assert align_loss(400.0, align_scale=4) == pytest.approx(align_loss(4.0, align_scale=4), rel=1e-6)
    assert align_loss(4.0, align_scale=4.0) == pytest.approx(align_loss(4.0), rel=1e-4)


@pytest.mark.parametrize("weighting", losses.ALIGN_WEIGHTINGS)
def test_warmup_actions_are_imitated_or_left_out(weighting):
    """Left out, they change nothing; without any others there is nothing to imitate."""
    networks, noise = make_networks(), make_noise()
    batch, planner = make_batch()
    planner["planner_stds"][:, ::2] = losses.WARMUP_STD
    config = replace(CONFIG, alignment="forward_kl", align_weighting=weighting)

    def align_loss(planner, **settings):
        _, _, terms, _ = both_losses(networks, batch, planner, noise, config=replace(config, **settings))
        return terms["align_loss"].item()

    moved = dict(planner, planner_actions=planner["planner_actions"].clone())
    moved["planner_actions"][:, ::2] *= -0.5
    assert align_loss(moved) != align_loss(planner)
    assert align_loss(moved, align_warmup=False) == align_loss(planner, align_warmup=False) != 0.0
    warmup = dict(planner, planner_stds=th.full_like(planner["planner_stds"], losses.WARMUP_STD))
    assert align_loss(warmup, align_warmup=False) == 0.0
