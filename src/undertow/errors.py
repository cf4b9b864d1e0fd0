"""The one error that users are meant to read.

Everything that a user can put right (a wrong name, a missing file, a pair of model and SAE that does not belong
together) is raised as `UndertowError`: what is wrong, with the value, and the way out. The command line prints it as one
line and exits with code 2; anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations


class UndertowError(Exception):
    """A problem that the user can solve.

    Args:
        problem: what is wrong, naming the field or file and the value found.
        way_out: what to do about it, as an imperative sentence.
    """

    def __init__(self, problem: str, way_out: str = "") -> None:
        self.problem = " ".join(problem.split())
        self.way_out = " ".join(way_out.split())
        super().__init__(f"{self.problem} {self.way_out}".strip())
