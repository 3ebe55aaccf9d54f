"""Our numbers against those of the authors' release, for the same parameters, data and noise."""

import pathlib
import re

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_boom.boom import BOOM
from sb3_boom.buffers import SubTrajectories
from sb3_boom.core import losses, planner
from sb3_boom.core.actor import bound_log_std, scaled_gaussian_log_prob, squash_correction
from sb3_boom.core.flat import FlatOptimizer
from sb3_boom.core.two_hot import TwoHot, symexp, symlog
from sb3_boom.update import update

AGENTS = ["agent_a6", "agent_a6_small_scale", "agent_a38", "agent_a61"]
N_UPDATES = 5
LR = 3e-4

# the authors' names for the networks, and where ours hold them
NETWORKS = {
    "enc": "world_model.encoder",
    "dyn": "world_model.dynamics",
    "rew": "world_model.reward",
    "pi": "actor.net",
    "q": "critic",
    "q_target": "critic_target",
}
LOSS_NAMES = {
    "consistency_loss": "consistency_loss",
    "reward_loss": "reward_loss",
    "value_loss": "critic_loss",
    "total_loss": "model_loss",
    "grad_norm": "grad_norm",
    "pi_loss": "actor_loss",
    "pi_q_loss": "actor_value_loss",
    "pi_fkl_loss": "align_loss",
    "pi_scale": "q_scale",
}


class Golden:
    """One agent's arrays, and our model set up as it was."""

    def __init__(self, path: pathlib.Path) -> None:
        self.arrays = dict(np.load(path))
        mlp_dim, joint_dim = self["before/dyn/0/weight"].shape
        enc_dim, obs_dim = self["before/enc/0/weight"].shape
        latent_dim = self["before/enc/1/weight"].shape[0]
        action_dim = joint_dim - latent_dim
        n_samples = self["plan0/noise/04"].shape[0]
        self.horizon = self["plan0/mean"].shape[0]
        self.model = BOOM(
            "MlpPolicy",
            SpacesOnly(obs_dim, action_dim),
            buffer_size=1,
            learning_starts=1,
            gamma=float(self["discount"]),
            handle_terminations=False,
            alignment="release",
            learning_rate=LR,
            horizon=self.horizon,
            planner_kwargs=dict(
                n_samples=n_samples,
                n_elites=len(self["plan0/elite_scores"]),
                n_policy_samples=len(self["plan0/noise/00"]),
                n_iterations=len(self["plan0/q_pairs"]),
            ),
            policy_kwargs=dict(
                enc_dim=enc_dim,
                mlp_dim=mlp_dim,
                latent_dim=latent_dim,
                n_critics=len(self["before/q/0/weight"]),
                dropout=0.0,
                compile=False,
            ),
            device="cpu",
        )
        self.policy = self.model.policy
        self.load("before")
        self.policy.q_scale.fill_(float(self["update/q_scale_before"]))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def tensor(self, name: str) -> th.Tensor:
        return th.as_tensor(self[name])

    def parameters(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays below a prefix by the name of our parameter."""
        found = {}
        for name, array in self.arrays.items():
            match = re.fullmatch(rf"{prefix}/(\w+)/(\d+)/(\w+)", name)
            if match:
                found[_our_name(*match.groups())] = array
        return found

    def load(self, prefix: str) -> None:
        state = {name: th.as_tensor(array) for name, array in self.parameters(prefix).items()}
        missing = set(dict(self.policy.named_parameters())) - set(state)
        assert not missing, f"no golden values for {missing}"
        self.policy.load_state_dict(state, strict=False)

    def update_args(self, prefix: str) -> tuple[SubTrajectories, losses.UpdateNoise, losses.LossConfig]:
        actions = self.tensor(f"{prefix}/action")
        rewards = self.tensor(f"{prefix}/reward")
        batch = SubTrajectories(
            observations=self.tensor(f"{prefix}/obs"),
            actions=actions,
            planner_actions=self.tensor(f"{prefix}/planner_action"),
            planner_stds=self.tensor(f"{prefix}/planner_std"),
            rewards=rewards,
            terminations=th.zeros_like(rewards),
            valid=th.ones_like(rewards, dtype=th.bool),
            indices=th.zeros(actions.shape[:2], dtype=th.int64),
        )
        noise = losses.UpdateNoise(
            self.tensor(f"{prefix}/noise/00"), self.tensor(f"{prefix}/noise/01"), self.tensor(f"{prefix}/q_pairs"), None, None
        )
        return batch, noise, self.model._loss_config()

    def run_update(self, prefix: str) -> dict[str, float]:
        """:return: what our update measured, by our names"""
        _, terms = update(self.policy, *self.update_args(prefix), self.model.max_grad_norm)
        return {name: term.item() for name, term in terms.items()}


class SpacesOnly(gym.Env):
    """An environment that is never stepped."""

    def __init__(self, obs_dim: int, action_dim: int) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)


def _our_name(network: str, layer: str, kind: str) -> str:
    if network in ("q", "q_target"):
        module = ("first", "second", "head")[int(layer)]
        own = {"weight": "linear.weight", "bias": "linear.bias", "ln_weight": "norm_weight", "ln_bias": "norm_bias"}[kind]
        return f"{NETWORKS[network]}.net.{module}.{kind if module == 'head' else own}"
    last = {"rew": "3", "pi": "2"}.get(network)
    own = {"weight": "linear.weight", "bias": "linear.bias", "ln_weight": "norm.weight", "ln_bias": "norm.bias"}[kind]
    return f"{NETWORKS[network]}.{layer}.{kind if layer == last else own}"


@pytest.fixture(params=AGENTS)
def golden(request, golden_dir) -> Golden:
    return Golden(golden_dir / f"{request.param}.npz")


def test_scalar_transforms_equal_the_release(golden_dir):
    d = {name: th.as_tensor(array) for name, array in np.load(golden_dir / "transforms.npz").items()}
    two_hot = TwoHot(n_bins=d["two_hot"].shape[-1])
    close = dict(rtol=1e-5, atol=1e-6)
    th.testing.assert_close(symlog(d["x"]), d["symlog"], **close)
    th.testing.assert_close(symexp(d["symlog"]), d["symexp_of_symlog"], **close)
    th.testing.assert_close(two_hot.encode(d["x"]), d["two_hot"], **close)
    th.testing.assert_close(two_hot.decode(d["logits"]), d["two_hot_inv"], **close)
    n = len(d["logits"])
    th.testing.assert_close(two_hot.cross_entropy(d["logits"], d["x"][:n]), d["soft_ce"], **close)


def test_policy_head_equals_the_release(golden_dir):
    d = {name: th.as_tensor(array) for name, array in np.load(golden_dir / "policy_head.npz").items()}
    mean, raw_log_std = d["head_output"].chunk(2, dim=-1)
    log_std = bound_log_std(raw_log_std)
    action = th.tanh(mean + d["noise"] * log_std.exp())
    gaussian = scaled_gaussian_log_prob(d["noise"], log_std)
    close = dict(rtol=1e-5, atol=1e-5)
    th.testing.assert_close(log_std, d["log_std"], **close)
    th.testing.assert_close(th.tanh(mean), d["mean"], **close)
    th.testing.assert_close(action, d["action"], **close)
    th.testing.assert_close(gaussian, d["gaussian_log_prob_before_squash"], **close)
    th.testing.assert_close(gaussian - squash_correction(action), d["log_prob"], **close)


def test_running_scale_equals_the_release(golden_dir):
    d = np.load(golden_dir / "running_scale.npz")
    scale, ours = th.ones(()), []
    for i in d["order"]:
        scale = losses.update_scale(scale, th.as_tensor(d["q_batches"][i]), tau=0.01)
        ours.append(float(scale))
    np.testing.assert_allclose(ours, d["value_after_each_update"].ravel(), rtol=1e-5)


def test_cold_and_warm_plans_equal_the_release(golden):
    mean = golden.policy.initial_mean(1)
    config, policy = golden.policy.planner_config, golden.policy
    for name in ("plan0", "plan1"):
        noises = [golden[f"{name}/noise/{i:02d}"] for i in range(config.horizon + 2 * config.n_iterations + 1)]
        trajectories, iterations, exploration = noises[: config.horizon], noises[config.horizon : -1], noises[-1]
        noise = planner.PlannerNoise(
            policy=th.as_tensor(np.stack(trajectories)).unsqueeze(1),
            candidates=th.as_tensor(np.stack(iterations[0::2])).unsqueeze(2),
            terminal=th.as_tensor(np.stack(iterations[1::2])).unsqueeze(1),
            exploration=th.as_tensor(exploration).unsqueeze(0),
            elite=th.zeros(1, config.n_elites),
            critic_pairs=golden.tensor(f"{name}/q_pairs"),
        )
        z = policy.world_model.encode(golden.tensor(f"{name}/obs").unsqueeze(0))
        networks = (policy.world_model, policy.actor, policy.critic)
        with th.no_grad():
            plan = planner.plan(*networks, config, z, mean, noise, policy.terminations_seen)
        mean = plan.mean
        assert golden[f"{name}/picked_elite"] == 0
        close = dict(rtol=1e-4, atol=1e-5)
        th.testing.assert_close(plan.planner_action[0], golden.tensor(f"{name}/elite_first_action"), **close)
        th.testing.assert_close(plan.planner_std[0], golden.tensor(f"{name}/std_first"), **close)
        th.testing.assert_close(plan.mean[0], golden.tensor(f"{name}/mean"), **close)
        th.testing.assert_close(plan.exploratory_action[0], golden.tensor(f"{name}/action"), **close)


def test_elite_weights_equal_the_release(golden):
    """The last iteration's weights of the cold plan, from refine() itself."""
    policy, config = golden.policy, golden.policy.planner_config
    with th.no_grad():
        z = policy.world_model.encode(golden.tensor("plan0/obs").unsqueeze(0))
        noise = th.as_tensor(np.stack([golden[f"plan0/noise/{i:02d}"] for i in range(config.horizon)])).unsqueeze(1)
        networks = (policy.world_model, policy.actor, policy.critic)
        actions = planner.policy_trajectories(policy.world_model, policy.actor, z, noise)
        mean = th.zeros(config.horizon, 1, policy.action_dim)
        std = th.full_like(mean, config.max_std)
        for i in range(config.n_iterations):
            first = config.horizon + 2 * i
            mean, std, _, weights, _ = planner.refine(
                *networks, config, z, actions, mean, std,
                golden.tensor(f"plan0/noise/{first:02d}").unsqueeze(1),
                golden.tensor(f"plan0/noise/{first + 1:02d}").unsqueeze(0),
                golden.tensor("plan0/q_pairs")[i], policy.terminations_seen,
            )  # fmt: skip
    th.testing.assert_close(weights[0], golden.tensor("plan0/elite_scores"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("is_flat", [True, False])
def test_raw_gradients_equal_the_release(golden, is_flat, monkeypatch):
    """Gradients before clipping, of both losses, as our update computes them: end to end, and one by one."""
    raw: dict[str, th.Tensor] = {}
    names = {id(parameter): name for name, parameter in golden.policy.named_parameters()}
    clip = th.nn.utils.clip_grad_norm_

    def recording_clip(parameters, max_norm):
        raw.update({names[id(parameter)]: parameter.grad.clone() for parameter in parameters})
        return clip(parameters, max_norm)

    step = FlatOptimizer.step

    def recording_step(flat, gradient, max_norm):
        parts = gradient.clone().split([parameter.numel() for parameter in flat.parameters])
        raw.update({names[id(p)]: part.view_as(p) for p, part in zip(flat.parameters, parts, strict=True)})
        return step(flat, gradient, max_norm)

    if is_flat:
        monkeypatch.setattr(FlatOptimizer, "step", recording_step)
    else:
        monkeypatch.setattr("sb3_boom.update.flat_optimizer", lambda *_: None)
        monkeypatch.setattr(th.nn.utils, "clip_grad_norm_", recording_clip)
    golden.run_update("update")
    expected = golden.parameters("update/grad")
    assert set(raw) == set(expected)
    for name, array in expected.items():
        error = np.linalg.norm(raw[name].numpy() - array)
        assert error <= 1e-4 * np.linalg.norm(array) + 1e-9, f"{name}: error {error} of norm {np.linalg.norm(array)}"


def test_losses_and_parameter_changes_of_one_update_equal_the_release(golden):
    before = golden.parameters("before")
    terms = golden.run_update("update")
    for theirs, ours in LOSS_NAMES.items():
        assert terms[ours] == pytest.approx(float(golden[f"update/info/{theirs}"]), rel=1e-4, abs=1e-6), theirs
    grads, after = golden.parameters("update/grad"), golden.parameters("after")
    parameters = dict(golden.policy.named_parameters())
    wrong = total = 0
    for name, array in after.items():
        ours = parameters[name].detach().numpy() - before[name]
        error = np.abs(ours - (array - before[name]))
        if name in grads:
            error = error[np.abs(grads[name]) > 1e-6]
        wrong, total = wrong + int((error > 3e-6).sum()), total + error.size
    assert total > 1000
    assert wrong <= 0.001 * total, f"{wrong} of {total} parameters changed otherwise"


def test_losses_and_parameter_changes_of_five_updates_equal_the_release(golden):
    before = golden.parameters("before")
    for i in range(N_UPDATES):
        prefix = f"update{i + 1 if i else ''}"
        terms = golden.run_update(prefix)
        for theirs, ours in LOSS_NAMES.items():
            assert terms[ours] == pytest.approx(float(golden[f"{prefix}/info/{theirs}"]), rel=1e-3, abs=1e-5), theirs
    parameters = dict(golden.policy.named_parameters())
    errors = np.concatenate(
        [
            np.abs((parameters[name].detach().numpy() - before[name]) - (array - before[name])).ravel()
            for name, array in golden.parameters("after5").items()
        ]
    )
    assert np.mean(errors > 1e-5) <= 0.01


def test_automatic_settings_are_the_ones_of_the_release(golden):
    action_dim = golden.policy.action_dim
    dog = 24 <= action_dim <= 48
    assert golden.model.align_coef == pytest.approx(action_dim / (1000 if dog else 50))
    assert golden.policy._constructor_kwargs["simnorm_dim"] == (None if dog else 8)


def test_initial_parameters_have_the_statistics_of_the_paper():
    model = BOOM("MlpPolicy", SpacesOnly(40, 6), policy_kwargs=dict(model_size="1M", n_critics=5, compile=False), seed=0)
    policy = model.policy
    rows = policy.world_model.reward[-1].weight.detach()
    th.testing.assert_close(rows @ rows.T, th.eye(len(rows)), rtol=0, atol=1e-5)  # orthogonal
    assert not policy.critic.net.head.weight.any()
    special = {"world_model.reward.3.weight", "critic.net.head.weight"}
    for name, parameter in policy.named_parameters():
        values = parameter.detach()
        if name in special or name.startswith("critic_target"):
            continue
        if name.endswith("bias"):
            assert not values.any(), name
        elif "norm" in name:
            assert (values == 1).all(), name
        else:
            assert abs(values.std().item() - 0.02) < 5 * 0.02 / (2 * values.numel()) ** 0.5, name
            assert abs(values.mean().item()) < 5 * 0.02 / values.numel() ** 0.5, name
    for name, value in policy.critic.state_dict().items():
        assert th.equal(policy.critic_target.state_dict()[name], value), name
    assert policy.q_scale == 1.0
