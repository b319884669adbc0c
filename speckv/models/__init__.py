"""Models: the functional decoder, the transformers adapter, loading, compression, tokenizers."""
