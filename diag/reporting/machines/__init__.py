"""What programs read: findings as JSON of one published schema, and as JUnit, SARIF and GitHub annotations.

Rule of the room: a document says what the run says and nothing more; every document fits `schema()`.
"""

__all__ = ["annotations", "checking", "comparing", "findings", "policy", "schema"]
