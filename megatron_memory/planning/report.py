"""Figures as text."""


def bytes_text(size: float) -> str:
    """In the unit that suits."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
