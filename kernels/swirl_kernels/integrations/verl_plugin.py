"""Importing this registers swirl_vanilla, swirl_gspo, swirl_cispo and swirl_sapo with verl: for VERL_USE_EXTERNAL_MODULES."""

from swirl_kernels.integrations.verl import register

NAMES = register()
