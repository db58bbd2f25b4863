"""What a message from outside may be at most.

Law: numbers only. The codec checks against them before it spends memory; nothing here is negotiated.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one decoded message. Make one with ``Limits.of(layout.size)``."""

    model_size: int
    """Entries of the flat buffer; every block lies inside."""
    message_bytes_max: int
    entries_max: int
    """Entries that the blocks of one message may unfold to, all together."""
    envelope_bytes_max: int = 1 << 18
    blocks_max: int = 1024
    fields_max: int = 64
    coverage_max: int = 4096
    text_chars_max: int = 4096
    """Of a field's value; names (kinds, keys, peers) are bounded by the codec itself."""

    @classmethod
    def of(cls, model_size: int, *, copies_max: int = 4) -> Limits:
        """Limits for a model of ``model_size`` entries; a message may hold ``copies_max`` whole float32 copies."""
        entries_max = copies_max * model_size
        return cls(model_size, 4 * entries_max + (1 << 19), entries_max)
