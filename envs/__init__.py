"""The world: what happens whether or not anyone learns."""
