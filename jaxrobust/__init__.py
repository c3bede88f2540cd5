"""Robust training with generated data, in JAX and Haiku.

Gowal, Rebuffi, Wiles, Stimberg, Calian and Mann, "Improving Robustness using
Generated Data", NeurIPS 2021 (https://arxiv.org/abs/2110.09468).
"""

__version__ = '0.2.0.dev0'
