"""What the processes of `tests.train.meshes.Forked` have in common when they begin."""

import tests.train.meshes
import zoo.train.launch
import zoo.train.loop
import zoo.train.recipe  # noqa: F401
