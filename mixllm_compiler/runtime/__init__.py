"""What outlives one compilation: caches by weight identity, built kernels, records.

Importing it puts generated sources into the build cache on disk.
"""

from ..lowering import sources
from .build import build, materialize

sources.use_store(materialize, build)
