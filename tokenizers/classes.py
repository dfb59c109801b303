"""The tokenizers of vtc by the "class" in their config.json. Importing this table imports none of them, nor torch."""

#: class -> the module that defines it; no file can make vtc import another one
TOKENIZER_CLASSES = {
    "LocalVQ": "vtc.tokenizers.local_vq",
    "VQGAN": "vtc.tokenizers.vqgan",
    "IBQ": "vtc.tokenizers.ibq",
    "LlamaGenVQ": "vtc.tokenizers.llamagen_vq",
    "WeTok": "vtc.tokenizers.wetok",
    "OpenMAGVIT2": "vtc.tokenizers.open_magvit2",
    "VARVQVAE": "vtc.tokenizers.var_vqvae",
    "PyramidVQ": "vtc.tokenizers.pyramid_vq",
    "InfinityVAE": "vtc.tokenizers.infinity_vae",
    "DiffusersVQ": "vtc.tokenizers.diffusers_adapters",
    "ComposedTokenizer": "vtc.tokenizers.composed",
    "ComposedPyramid": "vtc.tokenizers.composed",
}

#: families of published checkpoints, by the name that says outright what a file is; `vtc.tokenizers.upstream`
FAMILIES = ("vqgan", "ibq", "llamagen", "wetok", "open_magvit2", "var", "infinity", "sc_vae")
