"""The receipt of a slot: each declared control as asked, and as the kernel has it."""

from sandboxd.receipt.again import Reading, take_reading
from sandboxd.receipt.parked import Parked
from sandboxd.receipt.reading import check, read_receipt

__all__ = ["Parked", "Reading", "check", "read_receipt", "take_reading"]
