"""What a step takes at least on a machine of known rates: the limit that every figure stands beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multibatch.manifest import Manifest


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """Two rates, neither of which a step can exceed."""

    bandwidth_gbps: float
    """Bytes read from memory per second, in 10^9."""
    gproducts: float | None
    """Products of the linear layers per second, in 10^9, with weights of the artifact's type; None: not measured."""

    def step_ms(self, manifest: Manifest, context_lens: Sequence[int], num_prompt_tokens: int = 0) -> float:
        """Milliseconds that a step takes at least: the longer of reading its bytes and making its products.

        Args:
            manifest: of the artifact.
            context_lens: positions that each decode row attends to. What attention itself multiplies is not counted.
            num_prompt_tokens: of one prompt, which gives one row of logits.
        """
        products = step_products(manifest, len(context_lens), num_prompt_tokens)
        return self.ms(step_bytes(manifest, context_lens), products)

    def decode_tokens_per_s(self, manifest: Manifest, context_lens: Sequence[int]) -> float:
        """The most tokens per second of decode steps with such rows."""
        return len(context_lens) * 1000 / self.step_ms(manifest, context_lens)

    def ms(self, num_bytes: float, num_products: float) -> float:
        """Milliseconds in which so much cannot be undercut, the one beside the other."""
        read = num_bytes / (self.bandwidth_gbps * 1e6)
        return read if self.gproducts is None else max(read, num_products / (self.gproducts * 1e6))


def best_of(rooflines: Sequence[Roofline]) -> Roofline:
    """The highest of each rate: what a neighbour took away in one measurement, the machine still has."""
    gproducts = [r.gproducts for r in rooflines if r.gproducts is not None]
    return Roofline(
        bandwidth_gbps=max(r.bandwidth_gbps for r in rooflines), gproducts=max(gproducts) if gproducts else None
    )


def step_bytes(manifest: Manifest, context_lens: Sequence[int]) -> int:
    """Bytes that a step must read: every weight once, and the KV of each decode row."""
    kv = manifest.kv
    per_position = kv.bytes_per_block(manifest.model.dtype) / kv.block_size
    return manifest.model.weight_bytes + round(per_position * sum(context_lens))


def step_products(manifest: Manifest, num_decode_rows: int, num_prompt_tokens: int = 0) -> int:
    """Products of the linear layers in a step of so many decode rows and one prompt of so many tokens."""
    model = manifest.model
    num_logits = num_decode_rows + bool(num_prompt_tokens)
    return (num_decode_rows + num_prompt_tokens) * model.products_per_token + num_logits * model.products_per_logits
