"""What outlives one compilation: caches by weight identity, built kernels, records.

Importing it puts generated sources into the build cache on disk.
"""

from ..lowering import sources
from . import build as build

sources.use_store(build.materialize, build.build)
