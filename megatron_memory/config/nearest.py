"""The known name that an unknown one was probably meant to be."""

import difflib

from megatron_memory.config.flags import all_flags, all_spellings, flag_name


def suggest(key: str) -> str:
    """A sentence naming the nearest flag, or where to find them all.

    >>> suggest("hiden_size")
    'Did you mean --hidden-size?'
    """
    # Main names first: at equal distance they are better advice than an opposite or a synonym.
    names = [*all_flags(), *all_spellings(), "config"]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"Did you mean {flag_name(near[0])}?" if near else "See --help for all settings."
