"""The quickstart of README.md; `make quickstart` runs it.

Written by `make readme` from nbs/index.ipynb: edit that.
"""
import torch
from hilbert_attn import HilbertAttentionCore, explain_backend, hilbert_attention

# tokens of a 75 x 64 image, row by row: (B, H, N, D) = (1, 8, 4800, 64)
q, k, v = (torch.randn(1, 8, 75 * 64, 64, requires_grad=True) for _ in range(3))
out = hilbert_attention(q, k, v, grid=(75, 64), segment_size=256)  # (1, 8, 4800, 64)
wide, lse = hilbert_attention(q, k, v, grid=(75, 64), segment_size=1024,
                              dilation_rate=4, return_lse=True)    # lse (1, 8, 4800)
(out.mean() + wide.mean() + lse.mean()).backward()                 # exact gradients

layer = HilbertAttentionCore(512, num_heads=8, segment_size=256, grid=(75, 64))
tokens = layer(torch.randn(2, 75 * 64, 512))                       # (2, 4800, 512)
print(*(tuple(x.shape) for x in (out, wide, lse, q.grad, tokens)))
print(explain_backend(q, segment_size=1024, dilation_rate=4, memory=16 * 10**9))
