"""Adapters: how the suite calls attention that other libraries wrote.

Every module here describes one or more functions with `@candidate(short_name=...)`; `conformance.candidate.built_in`
finds them, so a new adapter is a new file and no edit anywhere else. An adapter only translates: layouts, argument
names and the library's own ways to say "causal" or "window". What a library cannot do is refused with `Unsupported`,
what it does differently on purpose is declared, and `docs/adapters.md` holds the evidence for each declaration.
A library is imported inside the functions that call it; reading this package needs none of them.
"""
