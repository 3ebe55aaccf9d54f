"""Signs of latents and critics that go wrong, measured when a row is logged: they would cost too much in every update."""

import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_boom.buffers import WeightedReplayBuffer
from sb3_boom.policies import BOOMPolicy

NEWEST = 128  # transitions looked at: the effective rank of more takes longer than an update
QUANTILES = (0.05, 0.5, 0.95)


def effective_rank(latents: th.Tensor) -> th.Tensor:
    """
    How many directions latents really vary in: exp of the entropy of their covariance's eigenvalues, scaled to sum to 1.

    :param latents: ``[n, L]``
    :return: scalar between 1 and ``min(n - 1, L)``; 1 if all latents are the same
    """
    centred = (latents - latents.mean(dim=0)).double()
    gram = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    eigenvalues = th.linalg.eigvalsh(gram).clamp(min=0.0)
    shares = eigenvalues / eigenvalues.sum().clamp(min=1e-30)
    return th.special.entr(shares).sum().exp()


def of_newest(
    policy: BOOMPolicy, replay_buffer: WeightedReplayBuffer | None, env: VecNormalize | None, gamma: float
) -> dict[str, float]:
    """
    Measure on the last transitions stored; draws no random number, and waits for the device.

    :param policy: whose networks to look at
    :param replay_buffer: that the transitions are in
    :param env: normalises observations and rewards
    :param gamma: ``γ``, discount per agent step
    :return: by the name to log: ``latent_norm``, mean norm of the encoded observations; ``latent_rank``, see
        :func:`effective_rank`; quantiles of the critics' mean value less the target, ``td_error_q05`` to ``td_error_q95``.
        Empty without transitions
    """
    if replay_buffer is None or replay_buffer.size() == 0:
        return {}
    batch = replay_buffer.newest(min(-(-NEWEST // replay_buffer.n_envs), replay_buffer.size()), env)
    steps = [
        (
            {key: value[t] for key, value in batch.observations.items()}
            if isinstance(batch.observations, dict)
            else batch.observations[t]
        )
        for t in (0, 1)
    ]
    policy.set_training_mode(False)
    with th.no_grad():
        z, next_z = (policy.world_model.encode(policy.features(obs)) for obs in steps)
        critics = th.arange(policy.critic.n_critics, device=z.device)
        actions = policy.actor(next_z)[0].tanh()
        target = policy.critic_target.values(next_z, actions, critics[:2]).amin(dim=0)
        goes_on = 1.0 if policy.world_model.termination is None else 1.0 - batch.terminations[0]
        target = batch.rewards[0] + gamma * goes_on * target
        errors = policy.critic.values(z, batch.actions[0], critics).mean(dim=0) - target
        measured = th.cat(
            [
                th.stack([z.norm(dim=-1).mean(), effective_rank(z[:NEWEST]).float()]),
                errors.flatten().quantile(th.tensor(QUANTILES, device=z.device)),
            ]
        )
    names = ["latent_norm", "latent_rank", *(f"td_error_q{round(100 * q):02d}" for q in QUANTILES)]
    return dict(zip(names, measured.tolist(), strict=True))
