"""What is fuzzed: each target has inputs, and a check that a right result or a refusal follows.

A check returns when the result is right and raises the documented error when the input is refused;
anything else that it raises is a bug. Where it is easy to say what must be refused, the check
insists on that, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from jaxlora.utils.errors import UserError
from tests.fuzz import folders, parsers, readers

Check = Callable[[Any, Path], None]


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that takes input from outside.

    Attributes:
      name: of the target.
      inputs: makes inputs.
      check: `(input, a scratch folder of the target's own)`.
      errors: the documented ones.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    check: Check
    errors: tuple[type[Exception], ...] = (UserError,)

    def accepts(self, value: Any, scratch: Path) -> bool:
        """Whether an input is taken or refused.

        Raises:
          Exception: if neither happens.
        """
        try:
            self.check(value, scratch)
        except self.errors:
            return False
        return True


def all_targets(samples: Path) -> dict[str, Target]:
    """All targets by name.

    Args:
      samples: an empty folder, for the sound files that inputs are made from.
    """
    found = [
        Target(name, inputs, check)
        for module in (readers, parsers, folders)
        for name, (inputs, check) in module.targets(samples).items()
    ]
    return {target.name: target for target in found}
