"""Saves or loads small models in a process of its own: `save FOLDER`, or `load FOLDER WHEN`.

WHEN says when hilbert_attn is imported: "first", "last" (after transformers), or "never"."""

import sys

import torch

what, folder, *when = sys.argv[1:]
if when in ([], ["first"]):
    import hilbert_attn

import transformers
import transformers.modeling_utils

if when == ["last"]:
    import hilbert_attn

transformers.logging.set_verbosity_error()
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)
TEXT = dict(**SIZES, num_key_value_heads=2, vocab_size=50)
IMAGE = dict(**SIZES, image_size=16, patch_size=4)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**IMAGE))


def clip():
    text, vision = dict(**SIZES, vocab_size=50), IMAGE
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision)
    )


def run(name: str, model) -> torch.Tensor:
    "The output for an input that is always the same; a wide picture for the ViT."
    model.eval()
    if name in ("llama", "dense"):
        return model(torch.arange(3, 33)[None]).logits.detach()
    shape = (1, 3, 8, 32) if name == "vit" else (1, 3, 16, 16)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if name == "vit":
        return model(
            pixels, interpolate_pos_encoding=True
        ).last_hidden_state.detach()
    return model.get_image_features(pixels).pooler_output.detach()


def calls(model) -> list[int]:
    "Into the package, layer by layer."
    sites = [getattr(module, "hilbert_site", None) for module in model.modules()]
    return [site.calls for site in sites if site is not None]


def save():
    for name, make in (("llama", llama), ("vit", vit), ("clip", clip)):
        model = make()
        part = model.vision_model if name == "clip" else model
        layers = {"0": {"shift": 3}, "-1": "dense"} if name == "vit" else None
        hilbert_attn.use_hilbert_attention(part, segment_size=4, layers=layers)
        torch.save(run(name, model), f"{folder}/{name}.pt")
        model.save_pretrained(f"{folder}/{name}")
        if name == "llama":
            model.set_attn_implementation("sdpa")
            torch.save(run(name, model), f"{folder}/dense.pt")
            model.save_pretrained(f"{folder}/dense")


def load():
    for name in ("llama", "dense", "vit", "clip"):
        auto = (
            transformers.AutoModelForCausalLM
            if name in ("llama", "dense")
            else transformers.AutoModel
        )
        try:
            model = auto.from_pretrained(f"{folder}/{name}")
        except ValueError as e:
            print(name, "refused:", e)
            continue
        error = (
            (run(name, model) - torch.load(f"{folder}/{name}.pt")).abs().max().item()
        )
        print(name, calls(model), "same" if error < 1e-5 else f"off by {error}")


if what == "save":
    save()
else:
    load()
