"""Process spans.

The modules, from the outside in; each imports only from those below it:

process_span   the public context manager
iterators      between a loop and its records; the held record of `next`
spans          a process span: its parent, its links, its attributes
scopes         the context while it lasts, and how it is restored
loops          whether a `for` statement asks, and how it ended
"""
