"""cbnerf: Codebook-NeRF, and a distributed search for its hyper-parameters."""

__version__ = "0.1.0"
