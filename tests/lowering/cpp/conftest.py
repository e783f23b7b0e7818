"""Libraries are built into the build cache on disk, once for all tests."""

import mixllm_compiler.runtime  # noqa: F401
