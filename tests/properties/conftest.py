"""Fewer examples than hypothesis takes by default: all properties together stay under a minute."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("properties", deadline=None, max_examples=40)
hypothesis.settings.load_profile("properties")
