"""What keeps the example from running: what was expected, what was found, what to do."""


class SceneError(Exception):
    """For people: its text is all that is printed."""
