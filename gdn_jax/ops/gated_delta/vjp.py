"""Gradients of the update; the backward pass runs the recurrence again."""

from gdn_jax.ops import vjp
from gdn_jax.ops.gated_delta.reference import reference

differentiable = vjp.differentiable(reference)
