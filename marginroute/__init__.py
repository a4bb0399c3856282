"""What a gateway host installs: views, policies, guards and bundles; numpy and the standard library only."""

__version__ = "0.1.0"
