"""The rule kinds: how a tensor of one dialect lies in the canonical space of its family.

A rule turns a named tensor into *placements*: pairs of a canonical key and a box. The key's wildcards
are carried over by what they caught. The box speaks of the canonical tensor's dims and of the memory
that the dialect's tensor already has, so a fused QKV is three placements of views, no copy. Because a
placement is a pair, the same list serves reading and writing: rules have no separate inverse.

Operations act on lists of boxes (a shard that cuts through an unflattened dim with k factors becomes
at most 2k - 1 boxes per shard).
"""
