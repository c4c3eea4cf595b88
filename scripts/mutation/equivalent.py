"""Changes without an effect that a test could see, by the mutant's key, with the reason; they are not tried."""

EQUIVALENT: dict[str, str] = {}
