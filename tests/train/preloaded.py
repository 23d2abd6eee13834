"""What the processes of `tests.train.meshes.Forked` have in common when they begin."""

import tests.train.meshes  # noqa: F401
import zoo.train.loop
import zoo.train.recipe  # noqa: F401
