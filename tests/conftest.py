"""Settings of every test process, made before torch or transformers are imported."""

from __future__ import annotations

import os

# The tests run in as many processes as there are cores: one thread each is fastest, and sums come out in one order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may need the Hub; one that asks for it fails at once, not after a time-out.
os.environ["HF_HUB_OFFLINE"] = "1"
