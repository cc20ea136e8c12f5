"""swirl-fast: Step-Wise Reinforcement Learning (arXiv 2504.04736) of language models that use tools over many steps."""

__version__ = "0.1.0"
