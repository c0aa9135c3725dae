"""Real input and output: Hugging Face directories, tokenizers, orbax checkpoints and Flax state.

Importing this package loads nothing. `tokenizer`, `hf_names` and `safetensors_files` work without jax, so that every file can be
checked before a device is touched; `hf`, `orbax_store` and `flax_state` turn files into sharded arrays and back.
"""
