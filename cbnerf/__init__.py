"""cbnerf: Codebook-NeRF, and a distributed search for its hyper-parameters."""

import os

__version__ = "0.1.0"

# Some virtual machines announce AMX and then stop a process that uses it (SIGILL). The networks
# here are too small to gain from it, so oneDNN stays below it unless told otherwise.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
