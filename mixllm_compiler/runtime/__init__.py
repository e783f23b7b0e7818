"""What outlives one compilation: caches by weight identity, built kernels, records.

Importing it puts generated sources into the build cache on disk, beside which `mixllm tune` keeps
its tables.
"""

from ..lowering import sources
from ..lowering.cuda import timed
from . import build

sources.use_store(build.materialize, build.build)
timed.use_folder(lambda: build.cache_dir() / "tables")
