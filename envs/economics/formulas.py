"""Formulas that gateway and world share, compiled as parts of the world's kernels."""

from __future__ import annotations

from envs.kernels import kernel
from marginroute import latency, pricing

running_mean = kernel(latency.running_mean, inline="always")
tokens_usd = kernel(pricing.tokens_usd, inline="always")
answer_usd = kernel(pricing.answer_usd, inline="always")
refund_usd = kernel(pricing.refund_usd, inline="always")
service_credit_usd = kernel(pricing.service_credit_usd, inline="always")
unserved_credit_usd = kernel(pricing.unserved_credit_usd, inline="always")
