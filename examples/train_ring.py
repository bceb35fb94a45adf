"""Train a small byte-level language model on real text, with the sequence split over the processes.

    python examples/train_ring.py                              # one process
    torchrun --nproc-per-node 2 examples/train_ring.py         # the same losses from two, each with half of the tokens
"""
import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from hilbert_attn.ring import ring_attention, ring_dilated_attention, shard_sequence


def read_text(path: str | None) -> bytes:
    "A file, or the English reference of the Python language that comes with Python."
    if path: return Path(path).read_bytes()
    from pydoc_data.topics import topics
    return "\n\n".join(topics.values()).encode()


class Block(nn.Module):
    "A transformer block on this rank's tokens; only attention looks at other ranks."

    def __init__(self, dim: int, heads: int, dense: bool, layout: str):
        super().__init__()
        self.heads, self.dense, self.layout = heads, dense, layout
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor: # (B, n, dim)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.dense: y = ring_attention(q, k, v, causal=True, layout=self.layout)
        else: y = ring_dilated_attention(q, k, v, (64, None), (1, 8), dilation_mode="residue", causal=True, layout=self.layout)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, tokens: int, dim: int = 64, heads: int = 4, layout: str = "zigzag"):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, dim), nn.Embedding(tokens, dim)
        self.blocks = nn.Sequential(Block(dim, heads, False, layout), Block(dim, heads, True, layout))
        self.head = nn.Linear(dim, 256)

    def forward(self, text: torch.Tensor, place: torch.Tensor) -> torch.Tensor: # both (B, n) -> (B, n, 256)
        return self.head(self.blocks(self.bytes(text) + self.places(place)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a file to learn; without it, the reference of the Python language")
    parser.add_argument("--tokens", type=int, default=1024, help="length of the sequence, over all processes")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layout", default="zigzag", help="contiguous or zigzag")
    parser.add_argument("--json", help="write losses and the norm of the weights to this file")
    args = parser.parse_args()

    launched, device = "RANK" in os.environ, torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if launched: dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # rank, world size and address come from torchrun
    first = not launched or dist.get_rank() == 0

    text = torch.frombuffer(bytearray(read_text(args.text)), dtype=torch.uint8).long()
    if len(text) <= args.tokens: parser.error(f"--tokens {args.tokens}: the text has {len(text)} bytes, and must have more")
    torch.manual_seed(0)  # the same weights and the same batches on every rank
    model = Model(args.tokens, layout=args.layout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(args.steps):
        start = torch.randint(len(text) - args.tokens, (1,)).item()
        whole = text[start:start + args.tokens + 1].to(device)[None]
        places = torch.arange(args.tokens, device=device)[None]
        source, target, place = (shard_sequence(x, dim=1, layout=args.layout) for x in (whole[:, :-1], whole[:, 1:], places))
        loss = F.cross_entropy(model(source, place).flatten(0, 1), target.flatten(), reduction="sum") / args.tokens  # this rank's part of the mean over all tokens
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        if launched:  # the ranks' parts add up: no averaging. With DDP, which averages, multiply the loss by the number of ranks
            for x in (total, *(p.grad for p in model.parameters())): dist.all_reduce(x)
        optimizer.step()
        losses.append(total.item())
        if first and (step % 5 == 0 or step == args.steps - 1): print(f"step {step:3}: {total.item():.6f} nats per byte", flush=True)
    if first and args.json: Path(args.json).write_text(json.dumps(dict(losses=losses, norm=sum(p.detach().double().square().sum().item() for p in model.parameters()) ** 0.5)))
    if launched: dist.destroy_process_group()


if __name__ == "__main__": main()
