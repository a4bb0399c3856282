"""Sizes of episodes and trainings for tests that only need some; `SMALL` is played, `TINY` is trained on."""

SMALL = {"horizon_s": 20.0, "requests_per_episode": 100}
TINY = {"horizon_s": 5.0, "requests_per_episode": 25}
TINY_TRAINING = {
    "steps": 1024,
    "n_envs": 8,
    "rollout_steps": 32,
    "minibatch": 128,
    "epochs": 2,
    "width": 8,
    "normaliser_episodes": 2,
    "validation_episodes": 2,
    "gate_episodes": 2,
    "checkpoint_every_steps": 512,
    "validations": 2,
    "sees": "all",  # so short an episode hears of no answer
}
