"""The atlas: a static page for every mechanism, written from its file, and an index with the coverage table.

`write.write_atlas` (`attnspec atlas --out DIR`) writes it. Nothing on a page is typed: equations are typeset from the
checked tree, and the pictures of who reads whom are derivatives of the equations (`pattern`), which needs PyTorch.
"""
