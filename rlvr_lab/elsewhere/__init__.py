"""Entropy in other fields: one module per work, its core equations and the smallest demonstration with its control.

Nothing in the package uses these modules but the replay of golden files; they use `core`, `show`, torch, numpy and
scipy. Losses and an optimizer that training can use are in `core`: `cpl`, `preference_losses`, `classp`.
`rlvr-lab methods --all` lists them under the group "elsewhere".
"""
