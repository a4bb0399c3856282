"""The world: what happens whether or not anyone learns.

Importing this package registers `marginroute/Fleet-v0` with Gymnasium; the environment itself is imported only when it
is made.
"""

import gymnasium


def register() -> None:
    """Registers the environments with Gymnasium; safe to call again."""
    if "marginroute/Fleet-v0" not in gymnasium.registry:
        gymnasium.register(
            id="marginroute/Fleet-v0",
            entry_point="envs.fleet_env:FleetEnv",
            vector_entry_point="envs.vector_env:FleetVectorEnv",
        )


register()
