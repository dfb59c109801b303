"""The generators of vtc by the "class" in their config.json. Importing this table imports none of them, nor torch."""

#: class -> the module that defines it; no file can make vtc import another one
GENERATOR_CLASSES = {
    "VAR": "vtc.generators.var",
    "Infinity": "vtc.generators.infinity",
    "LlamaGen": "vtc.generators.llamagen",
}

#: the files of a generator's folder (`vtc.generators.pretrained`), which are all that is asked of the Hub
GENERATION_CONFIG, CALIBRATION, TOKENIZER, DRAFT = "generation_config.json", "kv.safetensors", "tokenizer", "draft"
