"""The learning rate's schedule: `instrument` is the instrument, the other files hold what it alone needs."""

__all__: list[str] = []
