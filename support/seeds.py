"""Seeds of random streams that have nothing to do with each other."""


def mix_seeds(*numbers):
    """One seed from several numbers; neighbouring numbers give unrelated streams (FNV-1a, 63 bits)."""
    value = 0xCBF29CE484222325
    for number in numbers:
        for byte in int(number).to_bytes(8, "little"):
            value = ((value ^ byte) * 0x100000001B3) % 2**64
    return value % 2**63
