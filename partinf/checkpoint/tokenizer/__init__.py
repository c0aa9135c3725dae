"""Text to token ids and back, from a tokenizer.json or a sentencepiece tokenizer.model.

Owns what the two formats have in common for the Llama family: an id stands for some bytes, and text is the bytes of its ids read as UTF-8.
jax is not imported.

* `settings` reads the files next to a vocabulary; `ends` says which ids end a text.
* `json_vocabulary` and `sentencepiece_vocabulary` are the two formats; `pieces` is how they write bytes, `marks` finds tokens by name.
* `length` bounds how few tokens a text can have; `seen` says what of a text a tokenizer.json certainly keeps.
* `text` is what other packages use: encoding, decoding, and decoding of a stream.
"""

from partinf.checkpoint.tokenizer.ends import ends_by_id
from partinf.checkpoint.tokenizer.load import find_tokenizer, has_tokenizer, load_tokenizer
from partinf.checkpoint.tokenizer.text import Tokenizer, TokenStream, TooLong
from partinf.checkpoint.tokenizer.vocabulary import Vocabulary

__all__ = ["TokenStream", "Tokenizer", "TooLong", "Vocabulary", "ends_by_id", "find_tokenizer", "has_tokenizer", "load_tokenizer"]
