"""Training of MAGNeT: masked, non-autoregressive text-to-audio (Ziv et al., ICLR 2024, arXiv 2401.04577)."""

__version__ = "0.1.0"
