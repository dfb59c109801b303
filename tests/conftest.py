"""What all tests share; where reference material lies is in tests/shared.py.

The torchvision guard is not called here on purpose: a module that forgot to call it must fail in the tests as it would
at a user's.
"""

import os

# Before torch is imported anywhere: nothing in the tests may look for a model on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
