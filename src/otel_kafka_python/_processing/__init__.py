"""Process spans.

The modules, from the outside in; each imports only from those below it:

process_span   the public context manager
iterators      what stands between a loop and the records; the held record of `next`
spans          a process span: its parent, its links, its attributes
scopes         what is current while it lasts, and how that is undone
loops          whether a `for` statement asks, and how it ended
"""
